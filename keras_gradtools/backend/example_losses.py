"""A compiled Keras loss, one value for each example: this file knows how Keras reduces losses.

`Loss.__call__` passes its values, with weights and masks, through `reduce_weighted_values`. Taking that one function
over leaves to Keras which outputs have which loss, with what weight, and what the mask does.
"""

import threading

from keras import ops
from keras.src.losses import loss as keras_loss
from keras.src.trainers.compile_utils import CompileLoss

from keras_gradtools.backend.state import StateScope


class _Thread(threading.local):
    per_example = False


_thread = _Thread()


def compiled(loss):
    """The loss that `compile(loss=loss)` would make."""
    return CompileLoss(loss)


def replicas():
    """By how much Keras divides a loss where each replica of a `tf.distribute` strategy computes its own; else 1."""
    return keras_loss.unscale_loss_for_distribution(ops.convert_to_tensor(1.0))


def on_replica(loss):
    """The share of one replica in `loss`, a mean over its own examples."""
    return keras_loss.scale_loss_for_distribution(loss)


def total_loss(compile_loss, y, y_pred):
    """The compiled loss without sample weights; what Keras tracks of it is dropped."""
    with StateScope():
        return compile_loss(y, y_pred)


def example_losses(compile_loss, y, y_pred):
    """The loss of each example, without sample weights: of shape `(batch,)`, with the compiled loss as its mean.

    None where the loss gives one number for the batch, from which no example's can be told.
    """
    _thread.per_example = True
    try:
        losses = total_loss(compile_loss, y, y_pred)
    finally:
        _thread.per_example = False
    return losses * ops.cast(replicas(), losses.dtype) if len(losses.shape) == 1 else None


def _reduce(values, sample_weight=None, mask=None, reduction="sum_over_batch_size", dtype=None):
    if not _thread.per_example:
        return _reduce_batch(values, sample_weight, mask, reduction, dtype)
    values = ops.convert_to_tensor(values, dtype=dtype)
    kept = _reduce_batch(values, sample_weight, mask, None, dtype)
    if not len(kept.shape):
        return kept
    ones = ops.ones_like(values)
    # Keras' reduction is linear in the values, with one factor for all: that of a loss that is 1 everywhere.
    count = ops.sum(_reduce_batch(ones, sample_weight, mask, None, dtype))
    factor = ops.divide_no_nan(_reduce_batch(ones, sample_weight, mask, reduction, dtype), count)
    if len(factor.shape):
        factor = ops.convert_to_tensor(1.0, kept.dtype)
    batch_size = ops.shape(kept)[0]
    return ops.sum(ops.reshape(kept, (batch_size, -1)), axis=1) * factor * ops.cast(batch_size, kept.dtype)


_reduce_batch = keras_loss.reduce_weighted_values
keras_loss.reduce_weighted_values = _reduce
