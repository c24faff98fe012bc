"""A layer that returns the Laplacian of a wrapped layer."""

import keras

from keras_gradtools.annotations import Function, Nested
from keras_gradtools.transforms.layers.differential_operator import DifferentialOperator
from keras_gradtools.transforms.taylor.operators import laplacian_of


@keras.saving.register_keras_serializable(package="keras_gradtools")
class Laplacian(DifferentialOperator):
    r"""Returns the Laplacian of a wrapped layer at each example, $\sum_i \partial^2 y_{b k} / \partial x_{b i}^2$.

    For physics-informed networks: a loss on this output trains the wrapped layer. The layer is saved and loaded with
    its model.

    Args:
        layer: A Keras layer or model that takes points of shape `(batch, n)`. It is shared, not copied.
        axes: The indices of the inputs to sum over, as a list. By default all n inputs.
        return_outputs: Whether to return the pair `(outputs, laplacian)` instead of the Laplacian alone.
        inputs: The name (or dict key) or position of the input to differentiate with respect to, if `layer` takes
            several. By default its only floating-point input. The others are passed on unchanged.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: A tensor of shape `(batch, n)`, or the several inputs of `layer`.
        training: Passed on to `layer`.

    Returns:
        A tensor with the shape of the output of `layer`.

    Raises:
        ValueError: For invalid options, inputs of another rank, and axes that do not exist.

    Cost:
        That of `kg.laplacian`. One more call of the layer with `return_outputs`, and in training mode if the layer has
        a state to update.

    Example:

    >>> import keras
    >>> import keras_gradtools as kg
    >>> radius = keras.layers.Lambda(lambda x: keras.ops.sum(x * x, axis=1, keepdims=True))
    >>> [float(v) for v in kg.layers.Laplacian(radius)(keras.ops.ones((2, 3)))[:, 0]]
    [6.0, 6.0]

    Source: Raissi, Perdikaris & Karniadakis, "Physics-informed neural networks" (2019).
    """

    def derivative(self, fun: Function, x: Nested) -> Nested:
        return laplacian_of(fun, x, self._require_axes(x))[1]

    def derivative_spec(self, inputs: Nested, outputs: Nested) -> Nested:
        self._require_axes(inputs)
        return outputs.shape
