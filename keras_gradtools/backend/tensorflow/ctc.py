"""A CTC loss that can be differentiated twice. The second derivative of TensorFlow's own is NaN.

For states that no alignment reaches, TensorFlow uses the logarithm of zero, which is infinite. Here it is a very
negative finite number.
"""

import functools

import tensorflow as tf

from keras_gradtools.keras_state import recording

_IMPOSSIBLE = -1e30


def differentiable(original):
    """Returns Keras' `ctc_loss`, computed by this file under a tape and in graphs, and by `original` elsewhere."""

    @functools.wraps(original)
    def ctc_loss(target, output, target_length, output_length, mask_index=0):
        if tf.executing_eagerly() and not recording.active_tapes():
            # The original is not used in a graph, because a tape may record a call of the graph later.
            return original(target, output, target_length, output_length, mask_index)
        target, output, target_length, output_length = map(
            tf.convert_to_tensor, (target, output, target_length, output_length)
        )
        return _loss(target, output, target_length, output_length, mask_index)

    return ctc_loss


def _loss(target, output, target_length, output_length, blank):
    """The negative log-likelihood, summed over all alignments (Graves et al., 2006, equations 5 to 8).

    `target` has shape `(batch, labels)`. `output` holds logits, with shape `(batch, time, classes)`.
    """
    if output.dtype not in (tf.float32, tf.float64):
        output = tf.cast(output, tf.float32)
    target, target_length, output_length = (tf.cast(x, tf.int32) for x in (target, target_length, output_length))
    impossible = tf.constant(_IMPOSSIBLE, output.dtype)
    batch, labels = tf.shape(target)[0], tf.shape(target)[1]

    # The states are a blank before each label, the label, and a blank at the end.
    states = tf.stack([tf.fill(tf.shape(target), blank), target], axis=-1)
    states = tf.concat([tf.reshape(states, [batch, 2 * labels]), tf.fill([batch, 1], blank)], 1)
    # The blank between two labels can be skipped, unless the labels are equal.
    skips = (states[:, 2:] != blank) & (states[:, 2:] != states[:, :-2])
    skips = tf.concat([tf.zeros([batch, tf.minimum(2, 2 * labels + 1)], tf.bool), skips], 1)

    log_probabilities = tf.nn.log_softmax(output, axis=-1)
    of_states = tf.gather(log_probabilities, states, axis=2, batch_dims=1)
    of_states = tf.transpose(of_states, [1, 0, 2])
    first = tf.where(tf.range(2 * labels + 1) < 2, of_states[0], impossible)

    def shifted(forward, by):
        return tf.concat([tf.fill([batch, by], impossible), forward], 1)[:, : 2 * labels + 1]

    def step(forward, time):
        now, of_states = time
        into = tf.stack([forward, shifted(forward, 1), tf.where(skips, shifted(forward, 2), impossible)])
        following = tf.maximum(tf.reduce_logsumexp(into, axis=0) + of_states, impossible)
        return tf.where((now < output_length)[:, None], following, forward)

    times = tf.range(1, tf.shape(of_states)[0])
    every = tf.scan(step, (times, of_states[1:]), first)
    forward = tf.concat([first[None], every], 0)[-1]
    last = tf.stack([2 * target_length, tf.maximum(2 * target_length - 1, 0)], axis=1)
    found = tf.gather(forward, last, axis=1, batch_dims=1)
    # Without labels there is no last label, and index 0 is the blank, which is counted already.
    found = tf.where(tf.stack([target_length >= 0, target_length > 0], axis=1), found, impossible)
    loss = -tf.reduce_logsumexp(found, axis=1)
    return tf.where(loss < -_IMPOSSIBLE / 2, loss, tf.constant(float("inf"), loss.dtype))
