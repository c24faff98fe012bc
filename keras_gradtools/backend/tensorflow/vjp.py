"""The vjp of a function, by a tape of TensorFlow."""

import tensorflow as tf

from keras_gradtools.backend.tensorflow.native_tape import NativeTape


def pulled_back(fun, inputs, upstream):
    """The vjp of `fun` at `inputs` for the cotangent `upstream`. Zeros for an unconnected input."""
    native = NativeTape()
    with native, native:
        inputs = [tf.identity(x) for x in inputs]
        native.tape.watch(inputs)
        value = fun(*inputs)
    return native.tape.gradient(value, inputs, upstream, unconnected_gradients=tf.UnconnectedGradients.ZERO)
