"""A CTC loss that can be differentiated twice. The second derivative of TensorFlow's own is NaN.

For states that no alignment reaches, TensorFlow uses the logarithm of zero, which is infinite. `backend/ctc.py` has a
very negative finite number there.
"""

import functools

import tensorflow as tf

from keras_gradtools.backend import ctc
from keras_gradtools.keras_state import recording


def differentiable(original):
    """Returns Keras' `ctc_loss`, computed by `backend/ctc.py` under a tape or in a graph, else by `original`."""

    @functools.wraps(original)
    def ctc_loss(target, output, target_length, output_length, mask_index=0):
        if tf.executing_eagerly() and not recording.active_tapes():
            # The original is not used in a graph, because a tape may record a call of the graph later.
            return original(target, output, target_length, output_length, mask_index)
        output = tf.convert_to_tensor(output)
        if output.dtype not in (tf.float32, tf.float64):
            output = tf.cast(output, tf.float32)
        target, target_length, output_length = (tf.cast(x, tf.int32) for x in (target, target_length, output_length))
        log_probabilities = tf.transpose(tf.nn.log_softmax(output, axis=-1), [1, 0, 2])
        likelihood = ctc.log_likelihood(log_probabilities, target, target_length, output_length, mask_index, _fold)
        return tf.where(ctc.is_possible(likelihood), -likelihood, tf.constant(float("inf"), output.dtype))

    return ctc_loss


def _fold(step, first, elements):
    every = tf.scan(step, tuple(elements), first)
    return tf.concat([first[None], every], 0)[-1]
