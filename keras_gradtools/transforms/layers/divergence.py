"""A layer that returns the divergence of a wrapped layer."""

import keras

from keras_gradtools.annotations import Function, Nested
from keras_gradtools.transforms.layers.differential_operator import DifferentialOperator
from keras_gradtools.transforms.taylor.operators import divergence_estimate_of, divergence_of


@keras.saving.register_keras_serializable(package="keras_gradtools")
class Divergence(DifferentialOperator):
    r"""Returns the divergence of a wrapped layer at each example, $\sum_k \partial y_{b k} / \partial x_{b i_k}$.

    For physics-informed networks: a loss on this output trains the wrapped layer, for example towards an incompressible
    flow. The layer is saved and loaded with its model.

    Args:
        layer: A Keras layer or model that takes points of shape `(batch, n)` and returns vectors of shape `(batch, m)`.
            It is shared, not copied.
        axes: The index of the input $i_k$ for each of the m outputs, as a list. By default all n inputs in order.
        return_outputs: Whether to return the pair `(outputs, divergence)` instead of the divergence alone.
        inputs: The name (or dict key) or position of the input to differentiate with respect to, if `layer` takes
            several. By default its only floating-point input. The others are passed on unchanged.
        samples: The number of random directions for an estimate. By default None, for the exact divergence.
        directions: `"rademacher"`, `"gaussian"` or `"coordinates"`, as for `kg.divergence`.
        seed: An integer that seeds the directions, or None. Each call draws new ones, also outside of training.
        return_standard_error: Whether to return, after the estimate, its standard error.
        chunk_size: Number of axes, or of random directions, that are computed at once, `"auto"` or None, as for
            `kg.divergence`.
        memory_budget: As for `kg.divergence`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: A tensor of shape `(batch, n)`, or the several inputs of `layer`.
        training: Passed on to `layer`.

    Returns:
        A tensor of shape `(batch, 1)`, or a tuple: the outputs if asked for, the divergence, and its standard error if
        asked for.

    Raises:
        ValueError: For invalid options, and shapes that do not match.

    Cost:
        That of `kg.divergence`. One more call of the layer with `return_outputs`, and in training mode if the layer
        has a state to update.

    Example:

    >>> import keras
    >>> import keras_gradtools as kg
    >>> flow = keras.layers.Dense(2, kernel_initializer="ones")
    >>> [float(v) for v in kg.layers.Divergence(flow)(keras.ops.ones((3, 2)))[:, 0]]
    [2.0, 2.0, 2.0]

    Source: Raissi, Perdikaris & Karniadakis, "Physics-informed neural networks" (2019).
    """

    def derivative(self, fun: Function, x: Nested) -> Nested:
        axes = self._require_axes(x)
        if self._sampling is None:
            return divergence_of(fun, x, axes, self._chunks)[1]
        vectors = self._drawn(self._sampling, axes, x)
        return divergence_estimate_of(fun, x, axes, self._sampling, vectors, self._chunks)[1]

    def derivative_spec(self, inputs: Nested, outputs: Nested) -> Nested:
        axes = self._require_axes(inputs)
        if len(outputs.shape) != 2 or outputs.shape[1] != len(axes):
            raise ValueError(
                f"Divergence expects outputs of shape (batch, {len(axes)}), one for each axis. Received: shape "
                f"{tuple(outputs.shape)}."
            )
        return (outputs.shape[0], 1)
