"""Replaces conversions of colors whose derivatives in TensorFlow are wrong.

| function     | TensorFlow's derivative                                             |
| ------------ | ------------------------------------------------------------------- |
| `hsv_to_rgb` | zero                                                                |
| `rgb_to_hsv` | wrong for colors with a negative component, as in normalized images |
"""

import tensorflow as tf

from keras_gradtools.backend.tensorflow.elementwise import where_followed


def _hsv_to_rgb(original):
    @where_followed(original)
    def hsv_to_rgb(images, name=None):
        """The values of TensorFlow's kernel, by operations that have gradients."""
        hue, saturation, value = tf.split(images, 3, axis=-1)
        sixths = 6 * hue
        ramps = [tf.abs(sixths - 3) - 1, 2 - tf.abs(sixths - 2), 2 - tf.abs(sixths - 4)]
        pure = tf.clip_by_value(tf.concat(ramps, -1), 0, 1)
        return (1 - saturation + saturation * pure) * value

    return hsv_to_rgb


def _rgb_to_hsv(original):
    @where_followed(original)
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


def install():
    """Replaces the functions in TensorFlow, where Keras looks them up."""
    tf.image.hsv_to_rgb = _hsv_to_rgb(tf.image.hsv_to_rgb)
    tf.image.rgb_to_hsv = _rgb_to_hsv(tf.image.rgb_to_hsv)
