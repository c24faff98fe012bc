"""Replaces elementwise functions whose derivatives in TensorFlow are wrong at single points, or missing.

| function         | TensorFlow's derivative                                              |
| ---------------- | -------------------------------------------------------------------- |
| `celu`           | 2 at 0, instead of 1: both branches count 0                          |
| `power`          | NaN at 0 instead of 0, once the order exceeds the exponent           |
| `hsv_to_rgb`     | zero                                                                 |
| `rgb_to_hsv`     | wrong for colors with a negative component, as in normalized images  |
| `softsign`       | no second derivative                                                 |
"""

import functools

import tensorflow as tf
from tensorflow.python.framework import ops

from keras_gradtools.keras_state import recording

_registry = ops.gradient_registry._registry


def _where_followed(original):
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

    @_where_followed(original)
    def celu(x, alpha=1.0):
        return tf.where(x > 0, x, alpha * tf.math.expm1(tf.minimum(x, 0) / alpha))

    return celu


def followed(mended):
    """Makes a function that replaces `original` by `mended(original)`, under a tape and in graphs."""

    def replaced(original):
        return _where_followed(original)(mended(original))

    return replaced


def _hsv_to_rgb(original):
    @_where_followed(original)
    def hsv_to_rgb(images, name=None):
        """The values of TensorFlow's kernel, by operations that have gradients."""
        hue, saturation, value = tf.split(images, 3, axis=-1)
        sixths = 6 * hue
        ramps = [tf.abs(sixths - 3) - 1, 2 - tf.abs(sixths - 2), 2 - tf.abs(sixths - 4)]
        pure = tf.clip_by_value(tf.concat(ramps, -1), 0, 1)
        return (1 - saturation + saturation * pure) * value

    return hsv_to_rgb


def _rgb_to_hsv(original):
    @_where_followed(original)
    def rgb_to_hsv(images, name=None):
        """The values of TensorFlow's kernel, by operations that have right gradients."""
        red, green, blue = tf.unstack(images, 3, axis=-1)
        value = tf.reduce_max(images, -1)
        length = value - tf.reduce_min(images, -1)
        # Gray has no hue, and black no saturation. The denominators are 1 there, since 0 would leave NaN.
        is_gray, is_black = length <= 0, value <= 0
        sixth = 1 / (6 * tf.where(is_gray, tf.ones_like(length), length))
        hue = tf.where(
            tf.equal(red, value),
            (green - blue) * sixth,
            tf.where(tf.equal(green, value), (blue - red) * sixth + 1 / 3, (red - green) * sixth + 2 / 3),
        )
        hue = tf.where(is_gray, tf.zeros_like(hue), tf.where(hue < 0, hue + 1, hue))
        saturation = tf.where(is_black, tf.zeros_like(value), length / tf.where(is_black, tf.ones_like(value), value))
        return tf.stack([hue, saturation, value], -1)

    return rgb_to_hsv


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
    tf.image.hsv_to_rgb = _hsv_to_rgb(tf.image.hsv_to_rgb)
    tf.image.rgb_to_hsv = _rgb_to_hsv(tf.image.rgb_to_hsv)
