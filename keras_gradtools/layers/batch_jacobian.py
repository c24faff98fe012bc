"""The Jacobian of a layer as the output of a layer."""

import keras

from keras_gradtools.layers.derivative import Derivative
from keras_gradtools.transforms.jacobians import batch_jacobian


@keras.saving.register_keras_serializable(package="keras_gradtools")
class BatchJacobian(Derivative):
    r"""Returns the Jacobian of another layer at each example, $J_{b k i} = \partial y_{b k} / \partial x_{b i}$.

    A loss on it trains the wrapped layer: on known derivatives (Sobolev training), on what is left of an equation, on
    its norm. It is saved and loaded with the model that it is in. It takes for granted that examples do not depend on
    one another: see `kg.diagnostics.batch_independence`.

    Args:
        layer: a Keras layer or model of tensors of shape `(batch, ...)`, which returns one. It is shared, not copied.
        return_outputs: whether to return the outputs of the layer as well, `(outputs, jacobian)`.
        inputs: the name (key, or position) of the input to differentiate by, where `layer` takes several; the only
            floating-point one by default. The others are carried along as they are.
        **kwargs: those of `keras.layers.Layer`.

    Call arguments:
        inputs: what `layer` takes.
        training: passed on to `layer`.

    Returns:
        A tensor of shape `(batch, *out, *in)`, with `in` the shape of the input to differentiate by.

    Raises:
        ValueError: for options that do not fit, and for outputs, or an input to differentiate by, that are not
            one tensor of rank 2 or more.

    Cost:
        That of `kg.batch_jacobian`, and one call of the layer if its outputs or its state are asked for.

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

    def derivative(self, fun, x):
        return batch_jacobian(fun)(x)

    def derivative_spec(self, inputs, outputs):
        return (*outputs.shape, *inputs.shape[1:])
