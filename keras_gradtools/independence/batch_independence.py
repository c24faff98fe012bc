"""Tests whether the examples of a batch are independent. If they are not, a batch Jacobian is meaningless."""

import keras

from keras_gradtools import chosen_inputs, validation
from keras_gradtools.annotations import Function, InputNames, Nested
from keras_gradtools.independence.cross_example_gradients import BatchIndependence
from keras_gradtools.independence.example_mixing import examine

NAME = "batch_independence"


def batch_independence(
    model: Function, x: Nested, training: bool = False, *, seed: int = 0, inputs: InputNames = None
) -> BatchIndependence:
    r"""Tests whether any output of example i depends on the input of example j, and finds the layers that cause it.

    Batch Jacobians, per-example gradients and penalties on input gradients assume that examples are independent,
    $\partial y_i / \partial x_j = 0$ for $i \ne j$. With BatchNormalization in training mode, attention across the
    batch, or a loss over pairs of examples, their results have the right shape but no meaning. The test computes the
    vjp from the outputs of half of the examples, $S$, to all inputs, for random positive cotangents $u$:

    $$\text{leak}^2 = \frac{\sum_S \sum_{j \notin S} \lVert \sum_{i \in S} u_i \, \partial y_i / \partial x_j \rVert^2}
    {\sum_S \sum_{j \in S} \lVert \sum_{i \in S} u_i \, \partial y_i / \partial x_j \rVert^2}$$

    The sum over $S$ covers three halves and their complements. If the leak exceeds rounding (64 units in the last
    place), each layer is tested in the same way with its own inputs and outputs. Inputs that are not floating-point,
    such as tokens, have no gradient. For them, the test compares the outputs of $S$ before and after the other examples
    are exchanged. If all of these gradients or changes are zero, as behind a head that is initialized with zeros, the
    result is undecided. All calls draw the same random numbers. The model is not changed.

    Args:
        model: A Keras model or layer, or a function of `x`, for example a loss of each example.
        x: Two or more examples: tensors or arrays of shape `(batch, ...)`, in the nested structure that the model
            takes. More examples make it more likely that dependent pairs are among them.
        training: Whether the model is called in training mode. Must be False for a function.
        seed: An integer that seeds the random cotangents and the random half.
        inputs: The names, keys or positions of the inputs to test, which must be floating-point. By default, all inputs
            are tested, of any dtype.

    Returns:
        A `BatchIndependence` with the attributes `independent` (None if undecided), `leak` and `layers`. Print it for a
        report in words.

    Raises:
        ValueError: If there are fewer than two examples, if outputs have no batch axis, if gradients are not finite, or
            if it is called inside a compiled function, where tensors have no values.

    Cost:
        One call and six vjps, independent of the number of examples. If there is a leak, six more vjps for each layer.

    Example:

    >>> import keras
    >>> import keras_gradtools as kg
    >>> parts = [keras.Input((3,)), keras.layers.Dense(4), keras.layers.BatchNormalization(name="norm")]
    >>> model, x = keras.Sequential(parts), keras.random.normal((8, 3), seed=0)
    >>> kg.diagnostics.batch_independence(model, x).independent
    True
    >>> report = kg.diagnostics.batch_independence(model, x, training=True)
    >>> report.independent, report.layers
    (False, ('norm',))

    Source: TensorFlow's guide "Advanced automatic differentiation", section "Batch Jacobian", which warns of
    layers that mix examples.
    """
    if not callable(model):
        raise ValueError(
            f"{NAME} expects a Keras model, a layer or a function. Received: {validation.describe(model)}."
        )
    validation.require_flag(NAME, "training", training)
    validation.require_seed(NAME, seed)
    x = chosen_inputs.as_tensors(x, f"{NAME} expects tensors or arrays as `x`")
    names = chosen_inputs.require_names(NAME, inputs)
    chosen = None if names is None else chosen_inputs.choose(NAME, model, x, names)
    if isinstance(model, keras.Layer):
        kwargs = {"training": training} if model._call_has_training_arg else {}
        return examine(NAME, model, x, kwargs=kwargs, seed=seed, chosen=chosen)
    if training:
        raise ValueError(
            f"{NAME} has no `training` for functions: set it in the function itself. Received: training=True, and "
            f"{validation.describe(model)}."
        )
    return examine(NAME, model, x, seed=seed, chosen=chosen)
