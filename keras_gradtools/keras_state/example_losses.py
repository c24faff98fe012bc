"""Computes a compiled Keras loss as one value per example.

Keras only returns the loss of a whole batch. Every `Loss.__call__` reduces its values, with weights and masks, by
`reduce_weighted_values`, so replacing this one function is enough. Which output has which loss and weight, and what a
mask does, remains the work of Keras.
"""

import functools
import threading

import keras
from keras import ops

from keras_gradtools.keras_internals import losses as keras_losses
from keras_gradtools.keras_state import framework
from keras_gradtools.keras_state.scopes import StateScope, outside_scopes


class _Thread(threading.local):
    per_example = False
    scales_sums = True
    is_scalar = False


_thread = _Thread()

# Under a `tf.distribute` strategy, Keras divides the loss of a replica by the number of replicas, so that the sum over
# the replicas is the loss of the batch. `off_replica` undoes that. Elsewhere both return their argument.
on_replica = keras_losses.scale_loss_for_distribution
off_replica = keras_losses.unscale_loss_for_distribution


def compiled(loss, loss_weights=None):
    """The loss that `compile(loss=loss)` would make, but with the dtype of `loss` if that is a `keras.Loss`."""
    made = keras_losses.CompileLoss(loss, loss_weights)
    if isinstance(loss, keras.Loss):
        # Keras gives a `CompileLoss` the dtype `floatx`, even if the loss in it has another one.
        made._dtype_policy, made._dtype = keras.DTypePolicy(loss.dtype), loss.dtype
    return made


def loss_weights_of(compile_loss):
    """The `loss_weights` of a compiled loss, or None."""
    return compile_loss._user_loss_weights


def arguments_of(loss):
    """The keyword arguments that one of Keras' own losses passes to its function."""
    return dict(loss._fn_kwargs)


def total_loss(compile_loss, y, y_pred, sample_weight=None):
    """The value of the compiled loss. Updates of Keras' loss trackers are discarded."""
    if not compile_loss.built:
        # Building creates variables. They must not belong to a surrounding trace or scope, which would end before them.
        with framework.eagerly(), outside_scopes():
            compile_loss.build(*keras.tree.map_structure(_symbolic, (y, y_pred)))
    scope = StateScope()
    with scope, scope:
        return compile_loss(y, y_pred, sample_weight)


def _symbolic(x):
    return None if x is None else keras.KerasTensor(x.shape, keras.backend.standardize_dtype(x.dtype))


def example_losses(compile_loss, y, y_pred, scales_sums=True):
    """The loss of each example without sample weights, of shape `(batch,)`. Its mean is the compiled loss.

    So if the loss sums over the batch, each value is multiplied by the batch size. With `scales_sums=False`, it is not.
    Returns None if the loss gives only one number for the batch, which cannot be split into examples.
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
    # Keras' reduction multiplies the sum of the values by one factor. A loss that is 1 everywhere gives this factor.
    ones = ops.ones_like(values)
    count = ops.sum(reduce_batch(ones, None, mask, None, dtype))
    factor = ops.divide_no_nan(ops.sum(reduce_batch(ones, None, mask, reduction, dtype)), count)
    return _per_example(ops.sum, kept) * (factor * batch_size)


_MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")


def _per_example(reduce, values):
    axes = tuple(range(1, len(values.shape)))
    return reduce(values, axis=axes) if axes else values


keras_losses.reduction.replace(lambda reduce_batch: functools.partial(_reduce, reduce_batch))
