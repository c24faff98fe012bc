"""Reports of TensorFlow, and of Keras' code for it."""

import keras
import numpy as np
import tensorflow as tf

from tests.atlas.upstream import Report, cube_of_normalized, differences, line

VERSION = tf.__version__


def slope(fun, x, order=1):
    x = tf.convert_to_tensor(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = fun(x) if order == 1 else slope(fun, x, order - 1)
    return tape.gradient(y, x)


def normalized(t):
    x = tf.constant(line(0.0)[None], "float32") + t * tf.constant((line(1.0) - line(0.0))[None], "float32")
    return tf.reduce_sum(keras.layers.LayerNormalization(epsilon=1e-3)(x) ** 3)


def off_diagonal(t):
    return tf.eye(2) + t * tf.constant([[0.0, 1.0], [1.0, 0.0]])


REPORTS = (
    Report(
        "`keras.ops.logaddexp(x, 1.0)` at x = 1",
        lambda: slope(lambda x: keras.ops.logaddexp(x, tf.constant(1.0)), 1.0),
        0.5,
    ),
    Report("`keras.ops.ldexp(x, 3)` at x = 0", lambda: slope(lambda x: keras.ops.ldexp(x, 3), 0.0), 8.0),
    Report("`keras.ops.sinc(x)` at x = 0", lambda: slope(keras.ops.sinc, 0.0), 0.0),
    Report("`keras.ops.celu(x)` at x = 0", lambda: slope(keras.ops.celu, 0.0), 1.0),
    Report("`tf.math.bessel_i0(x)` at x = 0, second derivative", lambda: slope(tf.math.bessel_i0, 0.0, 2), 0.5),
    Report("`tf.pow(x, 1.0)` at x = 0, second derivative", lambda: slope(lambda x: tf.pow(x, 1.0), 0.0, 2), 0.0),
    Report(
        "the sum of `tf.image.hsv_to_rgb([[[0.1, 0.5, v]]])`, derivative with respect to v at 0.8",
        lambda: slope(lambda v: tf.reduce_sum(tf.image.hsv_to_rgb(tf.stack([0.1, 0.5, v])[None, None])), 0.8),
        2.3,
    ),
    Report(
        "the saturation of `tf.image.rgb_to_hsv([[[0.4, g, 0.3]]])`, derivative with respect to g at -0.1",
        lambda: slope(lambda g: tf.image.rgb_to_hsv(tf.stack([0.4, g, 0.3])[None, None])[0, 0, 1], -0.1),
        -2.5,
    ),
    Report(
        "the sum of cubes of a `LayerNormalization` of (1 + t, 2 - t, 4 + t / 2) at t = 0, second derivative",
        lambda: slope(normalized, 0.0, 2),
        differences(lambda t: cube_of_normalized(t, 1e-3), 2),
    ),
    Report(
        "`tf.nn.softmax_cross_entropy_with_logits([1., 1.], [z, 0.])`, whose labels sum to 2, at z = 0",
        lambda: slope(lambda z: tf.nn.softmax_cross_entropy_with_logits([1.0, 1.0], tf.stack([z, 0.0])), 0.0),
        0.0,
    ),
    Report(
        "the product of `tf.linalg.svd([[1, t], [t, 1]], compute_uv=False)` at t = 0, second derivative",
        lambda: slope(lambda t: tf.reduce_prod(tf.linalg.svd(off_diagonal(t), compute_uv=False)), np.float32(0.0), 2),
        -2.0,
    ),
)
