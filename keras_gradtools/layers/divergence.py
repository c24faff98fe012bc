"""The divergence of a layer as the output of a layer."""

import keras

from keras_gradtools.layers.differential_operator import DifferentialOperator
from keras_gradtools.transforms.differential_operators import divergence


@keras.saving.register_keras_serializable(package="keras_gradtools")
class Divergence(DifferentialOperator):
    r"""Returns the divergence of another layer at each example, $\sum_k \partial y_{b k} / \partial x_{b i_k}$.

    For physics-informed networks: a loss on it trains the wrapped layer, towards an incompressible flow, say. It is
    saved and loaded with the model that it is in.

    Args:
        layer: a Keras layer or model of points, of shape `(batch, n)`, that returns vectors of shape `(batch, m)`. It
            is shared, not copied.
        axes: the input that belongs to each of the m outputs, a list of numbers; all n by default.
        return_outputs: whether to return the outputs of the layer as well, `(outputs, divergence)`.
        inputs: the name (key, or position) of the input to differentiate by, where `layer` takes several; the only
            floating-point one by default. The others are carried along as they are.
        **kwargs: those of `keras.layers.Layer`.

    Call arguments:
        inputs: a tensor of shape `(batch, n)`, or what else `layer` takes.
        training: passed on to `layer`.

    Returns:
        A tensor of shape `(batch, 1)`.

    Raises:
        ValueError: for options and shapes that do not fit.

    Cost:
        That of `kg.divergence`, and one call of the layer if its outputs or its state are asked for.

    Example:

    >>> import keras
    >>> import keras_gradtools as kg
    >>> flow = keras.layers.Dense(2, kernel_initializer="ones")
    >>> [float(v) for v in kg.layers.Divergence(flow)(keras.ops.ones((3, 2)))[:, 0]]
    [2.0, 2.0, 2.0]

    Source: Raissi, Perdikaris & Karniadakis, "Physics-informed neural networks" (2019).
    """

    def derivative(self, fun, x):
        return divergence(fun, self.axes)(x)

    def derivative_spec(self, inputs, outputs):
        axes = self._check_axes(inputs)
        if len(outputs.shape) != 2 or outputs.shape[1] != len(axes):
            raise ValueError(
                f"Divergence expects outputs of shape (batch, {len(axes)}), one for each axis. Received: shape "
                f"{tuple(outputs.shape)}."
            )
        return (outputs.shape[0], 1)
