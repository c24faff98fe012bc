"""Replaces elementwise functions whose derivatives in TensorFlow are wrong at single points, or missing.

| function         | TensorFlow's derivative                                              |
| ---------------- | -------------------------------------------------------------------- |
| `celu`           | 2 at 0, instead of 1: both branches count 0                          |
| `power`          | NaN at 0 instead of 0, once the order exceeds the exponent           |
| `softsign`       | no second derivative                                                 |
"""

import functools

import tensorflow as tf
from tensorflow.python.framework import ops

from keras_gradtools.keras_state import recording

_registry = ops.gradient_registry._registry


def where_followed(original):
    """Decorates a replacement of `original` for float tensors, which is used under a tape and in graphs.

    Graphs are included because a tape may record a call of the graph later.
    """

    def decorator(fun):
        @functools.wraps(original)
        def call(x, *args, **kwargs):
            if tf.executing_eagerly() and not recording.active_tapes():
                return original(x, *args, **kwargs)
            x = tf.convert_to_tensor(x)
            return (fun if x.dtype.is_floating else original)(x, *args, **kwargs)

        return call

    return decorator


def celu(original):
    """Keras' `celu`, with one formula on each side of 0."""

    @where_followed(original)
    def celu(x, alpha=1.0):
        return tf.where(x > 0, x, alpha * tf.math.expm1(tf.minimum(x, 0) / alpha))

    return celu


def followed(mended):
    """Makes a function that replaces `original` by `mended(original)`, under a tape and in graphs."""

    def replaced(original):
        return where_followed(original)(mended(original))

    return replaced


def _pull_power(original):
    def gradient(op, upstream):
        x, y = op.inputs
        exponent = tf.get_static_value(y) if y.shape.rank == 0 else None
        is_skipped = 0 in (getattr(op, "skip_input_indices", None) or ())
        if x.dtype.is_complex or is_skipped or (exponent is not None and exponent != 0):
            return original(op, upstream)
        # At x = 0, the usual formula for the derivative of x^0, 0 x^-1, gives NaN instead of 0.
        by_x = upstream * y * tf.pow(x, tf.where(tf.equal(y, 0), tf.ones_like(y), y - 1))
        axes, _ = tf.raw_ops.BroadcastGradientArgs(s0=tf.shape(x), s1=tf.shape(y))
        return tf.reshape(tf.reduce_sum(by_x, axes), tf.shape(x)), original(op, upstream)[1]

    return gradient


def _pull_softsign_gradient(op, upstream):
    gradients, x = op.inputs
    slope = 1 / tf.square(1 + tf.abs(x))
    return upstream * slope, -2 * upstream * gradients * slope * tf.sign(x) / (1 + tf.abs(x))


def install():
    power = _registry.pop("Pow")["type"]
    ops.RegisterGradient("Pow")(_pull_power(power))
    if "SoftsignGrad" not in _registry:
        ops.RegisterGradient("SoftsignGrad")(_pull_softsign_gradient)
