"""Keras masks: no gradients for padding."""

from keras import ops

from keras_gradtools.keras_state.layer_state import get_keras_mask, set_keras_mask


def mask_of(x):
    """The mask of `x`, reshaped to broadcast over it, or None if it has no mask."""
    mask = get_keras_mask(x)
    if mask is None:
        return None
    return ops.reshape(mask, (*ops.shape(mask), *[1] * (len(x.shape) - len(mask.shape))))


def with_mask_of(x, original):
    """`x` with the mask of `original`. Masked elements have no gradient."""
    mask = mask_of(original)
    if mask is None:
        return x
    x = ops.where(mask, x, ops.stop_gradient(x))
    set_keras_mask(x, get_keras_mask(original))
    return x


def without_padding(y):
    """`y`, set to zero where it is masked."""
    mask = mask_of(y)
    return y if mask is None else y * ops.cast(mask, y.dtype)
