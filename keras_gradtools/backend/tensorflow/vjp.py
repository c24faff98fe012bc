"""The vjp of a function, by a tape of TensorFlow."""

import tensorflow as tf


def pulled_back(fun, inputs, upstream):
    """The vjp of `fun` at `inputs` for the cotangent `upstream`. Zeros for an unconnected input."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        inputs = [tf.identity(x) for x in inputs]
        tape.watch(inputs)
        value = fun(*inputs)
    return tape.gradient(value, inputs, upstream, unconnected_gradients=tf.UnconnectedGradients.ZERO)
