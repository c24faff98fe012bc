"""One vector for each example of a batch, stored in one or several tensors of shape `(batch, ...)`."""

import math

import numpy as np
from keras import ops

from keras_gradtools import validation


def squares(tensors):
    """The squared length of each example's vector, of shape `(batch,)`."""
    return sum(ops.sum(ops.square(t), axis=tuple(range(1, len(t.shape)))) for t in tensors)


def normalized(tensors):
    """The vectors divided by their lengths, or zeros where the length is zero, and the lengths."""
    length = ops.sqrt(squares(tensors))
    inverse = ops.where(length > 0, 1.0 / ops.where(length > 0, length, 1.0), 0.0)
    return [t * for_each(inverse, t) for t in tensors], length


def for_each(values, like):
    """`values` of shape `(batch,)`, reshaped and cast to broadcast over `like` of shape `(batch, ...)`."""
    return ops.reshape(ops.cast(values, like.dtype), (-1, *[1] * (len(like.shape) - 1)))


def split(rows, like):
    """Splits an array of shape `(batch, n)` into tensors of the shapes of `like`."""
    ends = np.cumsum([math.prod(t.shape[1:]) for t in like])[:-1]
    parts = np.split(rows, ends, axis=1)
    return [ops.convert_to_tensor(p.reshape(tuple(t.shape)), dtype=t.dtype) for p, t in zip(parts, like, strict=True)]


def numbers(x):
    """A tensor as a NumPy array in double precision."""
    return np.asarray(ops.convert_to_numpy(ops.cast(x, "float32") if _is_short(x) else x), "float64")


def _is_short(x):
    return validation.dtype_of(x) in ("float16", "bfloat16")
