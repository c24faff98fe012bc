"""Replaces Keras operations that, on TensorFlow, have wrong derivatives or lack second ones."""

import functools

import tensorflow as tf

from keras_gradtools.backend import keras_formulas
from keras_gradtools.backend.tensorflow import ctc, elementwise, steps
from keras_gradtools.keras_internals import backend_modules
from keras_gradtools.keras_state import recording

_FORMULAS = ("i0", "ldexp", "logaddexp", "logaddexp2", "nextafter", "sinc")


def install():
    neural, numpy = backend_modules.hooks["nn"], backend_modules.hooks["numpy"]
    neural["_compute_moments"].replace(_differentiable_moments)
    neural["ctc_loss"].replace(ctc.differentiable)
    neural["celu"].replace(elementwise.celu)
    neural["silu"].replace(steps.plain_silu)
    # Some of these functions do not exist in every supported Keras.
    for name in _FORMULAS:
        if name in numpy:
            numpy[name].replace(elementwise.followed(getattr(keras_formulas, name)))


def _differentiable_moments(to_first_order):
    return functools.partial(_moments, to_first_order)


def _moments(to_first_order, x, axes, keepdims):
    """Mean and variance, differentiable to any order.

    `tf.nn.moments`, which Keras' normalization layers use, takes the mean inside the variance for a constant. First
    derivatives are right, but all higher ones are silently wrong.
    """
    if tf.executing_eagerly() and not recording.active_tapes():
        # The original is not used in a graph, because a tape may record a call of the graph later.
        return to_first_order(x, axes, keepdims)
    mean = tf.reduce_mean(x, axes, keepdims=True)
    variance = tf.reduce_mean(tf.math.squared_difference(x, mean), axes, keepdims=keepdims)
    return (mean if keepdims else tf.squeeze(mean, axes)), variance
