"""Whether a batch Jacobian means anything: do the examples of a batch depend on one another?"""

import keras

from keras_gradtools import chosen_inputs, validation
from keras_gradtools.transforms.batch_independence import examine

NAME = "batch_independence"


def batch_independence(model, x, training=False, seed=0, *, inputs=None):
    r"""Says whether any output of example i depends on the input of example j, and which layers are the cause.

    A batch Jacobian, per-example gradients and penalties on input gradients take for granted that it does not,
    $\partial y_i / \partial x_j = 0$ for $i \ne j$; with BatchNormalization in training mode, attention across the
    batch, or a loss that picks pairs of examples, they have the right shape and no meaning. Here the outputs of half of
    the examples, $S$, are pulled back to all inputs with random positive cotangents $u$:

    $$\text{leak}^2 = \frac{\sum_S \sum_{j \notin S} \lVert \sum_{i \in S} u_i \, \partial y_i / \partial x_j \rVert^2}
    {\sum_S \sum_{j \in S} \lVert \sum_{i \in S} u_i \, \partial y_i / \partial x_j \rVert^2}$$

    for three halves and their complements. If it is more than rounding (64 units in the last place), each layer is
    judged in the same way by its own inputs and outputs. Inputs that are not floating-point, tokens say, have no
    gradient: there the outputs of $S$ are compared when the other examples change places. Where nothing that is looked
    at is other than zero, behind a head that begins with zeros for one, it cannot be told. All calls draw the same
    random numbers. Nothing in the model changes.

    Args:
        model: a Keras model or layer, or a function of `x`, a loss of each example for instance.
        x: two examples or more, in tensors or arrays of shape `(batch, ...)`, nested as the model takes them. The more,
            the more surely pairs that depend on one another are among them.
        training: whether a model is called as in training. Not for functions.
        seed: of the random numbers.
        inputs: the names (keys, or positions) of the inputs to judge by, floating-point ones; all by default, whatever
            their dtype.

    Returns:
        A `BatchIndependence`: `report.independent`, which is None where it cannot be told, `report.leak`,
        `report.layers`, and `print(report)`.

    Raises:
        ValueError: for fewer than two examples, outputs without a batch axis, gradients that are not finite, and
            inside a compiled function, where no values are known.

    Cost:
        One call and six pullbacks, whatever the number of examples; if something leaks, six more for each layer.

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

    Source: TensorFlow's guide "Advanced automatic differentiation", section "Batch Jacobian", which warns of it.
    """
    if not callable(model):
        raise ValueError(
            f"{NAME} expects a Keras model, a layer or a function. Received: {validation.describe(model)}."
        )
    if not isinstance(training, bool):
        raise ValueError(f"{NAME} expects True or False as `training`. Received: {validation.describe(training)}.")
    validation.require_seed(NAME, seed)
    x = chosen_inputs.as_tensors(x, f"{NAME} expects tensors or arrays as `x`")
    names = chosen_inputs.checked_choice(NAME, inputs)
    chosen = None if names is None else chosen_inputs.choose(NAME, model, x, names)
    if isinstance(model, keras.Layer):
        kwargs = {"training": training} if model._call_has_training_arg else {}
        return examine(NAME, model, x, kwargs=kwargs, seed=seed, chosen=chosen)
    if training:
        raise ValueError(
            f"{NAME} has no `training` for functions, which call their model as they do. Received: training=True, and "
            f"{validation.describe(model)}."
        )
    return examine(NAME, model, x, seed=seed, chosen=chosen)
