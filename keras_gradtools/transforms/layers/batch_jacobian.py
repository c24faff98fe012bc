"""A layer that returns the Jacobian of a wrapped layer."""

import keras

from keras_gradtools.annotations import Function, Nested
from keras_gradtools.transforms.jacobians import batch_jacobian
from keras_gradtools.transforms.layers.derivative import Derivative


@keras.saving.register_keras_serializable(package="keras_gradtools")
class BatchJacobian(Derivative):
    r"""Returns the Jacobian of a wrapped layer at each example, $J_{b k i} = \partial y_{b k} / \partial x_{b i}$.

    A loss on this output trains the wrapped layer: on known derivatives (Sobolev training), on the residual of an
    equation, or on the norm of the Jacobian. The layer is saved and loaded with its model. It assumes that the examples
    are independent, which `kg.diagnostics.batch_independence` checks.

    Args:
        layer: A Keras layer or model that takes tensors of shape `(batch, ...)` and returns one such tensor. It is
            shared, not copied.
        return_outputs: Whether to return the pair `(outputs, jacobian)` instead of the Jacobian alone.
        inputs: The name (or dict key) or position of the input to differentiate with respect to, if `layer` takes
            several. By default its only floating-point input. The others are passed on unchanged.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: The inputs of `layer`.
        training: Passed on to `layer`.

    Returns:
        A tensor of shape `(batch, *out, *in)`, where `in` is the shape of the input to differentiate with respect to.

    Raises:
        ValueError: For invalid options, and if the output or the input to differentiate with respect to is not one
            tensor of rank 2 or more.

    Cost:
        That of `kg.batch_jacobian`. One more call of the layer with `return_outputs`, and in training mode if the
        layer has a state to update.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> x = keras.Input((1,))
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(20, "tanh"), keras.layers.Dense(1)])
    >>> sobolev = keras.Model(x, kg.layers.BatchJacobian(model, return_outputs=True)(x))
    >>> sobolev.compile(keras.optimizers.Adam(0.01), ["mse", "mse"])
    >>> points = np.linspace(-1, 1, 64, dtype="float32")[:, None]
    >>> history = sobolev.fit(points, [np.sin(points), np.cos(points)[:, None]], epochs=100, verbose=0)
    >>> history.history["loss"][-1] < 0.01  # of values and slopes
    True

    Source: Czarnecki et al., "Sobolev training for neural networks" (arXiv:1706.04859, 2017).
    """

    def derivative(self, fun: Function, x: Nested) -> Nested:
        return batch_jacobian(fun)(x)

    def derivative_spec(self, inputs: Nested, outputs: Nested) -> Nested:
        return (*outputs.shape, *inputs.shape[1:])
