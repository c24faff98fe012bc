"""The Laplacian of a layer as the output of a layer."""

import keras

from keras_gradtools.layers.differential_operator import DifferentialOperator
from keras_gradtools.transforms.differential_operators import laplacian


@keras.saving.register_keras_serializable(package="keras_gradtools")
class Laplacian(DifferentialOperator):
    r"""Returns the Laplacian of another layer at each example, $\sum_i \partial^2 y_{b k} / \partial x_{b i}^2$.

    For physics-informed networks: a loss on it trains the wrapped layer. It is saved and loaded with the model that it
    is in.

    Args:
        layer: a Keras layer or model of points, of shape `(batch, n)`. It is shared, not copied.
        axes: over which of the n inputs the sum goes, a list of numbers; all by default.
        return_outputs: whether to return the outputs of the layer as well, `(outputs, laplacian)`.
        inputs: the name (key, or position) of the input to differentiate by, where `layer` takes several; the only
            floating-point one by default. The others are carried along as they are.
        **kwargs: those of `keras.layers.Layer`.

    Call arguments:
        inputs: a tensor of shape `(batch, n)`, or what else `layer` takes.
        training: passed on to `layer`.

    Returns:
        A tensor of the shape of what `layer` returns.

    Raises:
        ValueError: for options that do not fit, inputs of another rank, and axes that do not exist.

    Cost:
        That of `kg.laplacian`, and one call of the layer if its outputs or its state are asked for.

    Example:

    >>> import keras
    >>> import keras_gradtools as kg
    >>> radius = keras.layers.Lambda(lambda x: keras.ops.sum(x * x, axis=1, keepdims=True))
    >>> [float(v) for v in kg.layers.Laplacian(radius)(keras.ops.ones((2, 3)))[:, 0]]
    [6.0, 6.0]

    Source: Raissi, Perdikaris & Karniadakis, "Physics-informed neural networks" (2019).
    """

    def derivative(self, fun, x):
        return laplacian(fun, self.axes)(x)

    def derivative_spec(self, inputs, outputs):
        self._check_axes(inputs)
        return outputs.shape
