"""A compiled Keras loss, one value for each example: this file knows how Keras reduces losses.

`Loss.__call__` passes its values, with weights and masks, through `reduce_weighted_values`. Taking that one function
over leaves to Keras which outputs have which loss, with what weight, and what the mask does.
"""

import functools
import threading

import keras
from keras import ops

from keras_gradtools import backend
from keras_gradtools.backend.state import StateScope, outside_scopes
from keras_gradtools.keras_internals import losses as keras_losses


class _Thread(threading.local):
    per_example = False
    scales_sums = True
    is_scalar = False


_thread = _Thread()

# By what a loss is to be multiplied so that the sum over the replicas of a `tf.distribute` strategy is the loss of the
# batch, and back. Elsewhere both return what they are given.
on_replica = keras_losses.scale_loss_for_distribution
off_replica = keras_losses.unscale_loss_for_distribution


def compiled(loss, loss_weights=None):
    """The loss that `compile(loss=loss)` would make, in the precision of `loss` where that has one."""
    made = keras_losses.CompileLoss(loss, loss_weights)
    if isinstance(loss, keras.Loss):
        # Keras makes it in `floatx`, whatever it is made of.
        made._dtype_policy, made._dtype = keras.DTypePolicy(loss.dtype), loss.dtype
    return made


def loss_weights_of(compile_loss):
    """The weights that a compiled loss was given for its parts; None for none."""
    return compile_loss._user_loss_weights


def arguments_of(loss):
    """The arguments that one of Keras' own losses passes on to its function."""
    return dict(loss._fn_kwargs)


def total_loss(compile_loss, y, y_pred, sample_weight=None):
    """The compiled loss; what Keras tracks of it is dropped."""
    if not compile_loss.built:
        # It has variables, which must outlive what is traced or scoped around this.
        with backend.eagerly(), outside_scopes():
            compile_loss.build(*keras.tree.map_structure(_symbolic, (y, y_pred)))
    scope = StateScope()
    with scope, scope:
        return compile_loss(y, y_pred, sample_weight)


def _symbolic(x):
    return None if x is None else keras.KerasTensor(x.shape, keras.backend.standardize_dtype(x.dtype))


def example_losses(compile_loss, y, y_pred, scales_sums=True):
    """The loss of each example, without sample weights: of shape `(batch,)`, with the compiled loss as its mean.

    So a loss that sums over the batch has them times the size of the batch; without `scales_sums` they are each
    example's own. None where a loss gives one number for the batch, from which no example's can be told.
    """
    _thread.per_example, _thread.scales_sums, _thread.is_scalar = True, scales_sums, False
    try:
        losses = total_loss(compile_loss, y, y_pred)
    finally:
        _thread.per_example, _thread.scales_sums = False, True
    if _thread.is_scalar or len(losses.shape) != 1:
        return None
    return off_replica(losses)


def _reduce(reduce_batch, values, sample_weight=None, mask=None, reduction="sum_over_batch_size", dtype=None):
    if not _thread.per_example:
        return reduce_batch(values, sample_weight, mask, reduction, dtype)
    values = ops.convert_to_tensor(values, dtype=dtype)
    if not len(values.shape):
        _thread.is_scalar = True
        return values
    if mask is None and reduction in _MEANS:
        return on_replica(_per_example(ops.mean, values))
    kept = reduce_batch(values, None, mask, None, dtype)
    if reduction not in _MEANS and not _thread.scales_sums:
        return on_replica(_per_example(ops.sum, kept))
    batch_size = ops.cast(ops.shape(kept)[0], kept.dtype)
    if mask is None:
        return _per_example(ops.sum, kept) * batch_size
    # Keras' reduction is linear in the values, with one factor for all: that of a loss that is 1 everywhere.
    ones = ops.ones_like(values)
    count = ops.sum(reduce_batch(ones, None, mask, None, dtype))
    factor = ops.divide_no_nan(ops.sum(reduce_batch(ones, None, mask, reduction, dtype)), count)
    return _per_example(ops.sum, kept) * (factor * batch_size)


_MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")


def _per_example(reduce, values):
    axes = tuple(range(1, len(values.shape)))
    return reduce(values, axis=axes) if axes else values


keras_losses.reduction.replace(lambda reduce_batch: functools.partial(_reduce, reduce_batch))
