"""Vectors for each example of a batch, spread over one or several tensors of shape `(batch, ...)`."""

import math

import numpy as np
from keras import ops

from keras_gradtools import validation


def squares(tensors):
    """The squared length of each example's part."""
    return sum(ops.sum(ops.square(t), axis=tuple(range(1, len(t.shape)))) for t in tensors)


def normalized(tensors):
    """Each example's part divided by its length, zeros where that is zero; and the lengths."""
    length = ops.sqrt(squares(tensors))
    inverse = ops.where(length > 0, 1.0 / ops.where(length > 0, length, 1.0), 0.0)
    return [t * for_each(inverse, t) for t in tensors], length


def for_each(values, like):
    """A number of each example, to be multiplied with its part of a tensor."""
    return ops.reshape(ops.cast(values, like.dtype), (-1, *[1] * (len(like.shape) - 1)))


def split(rows, like):
    """Rows of numbers in tensors of these shapes."""
    ends = np.cumsum([math.prod(t.shape[1:]) for t in like])[:-1]
    parts = np.split(rows, ends, axis=1)
    return [ops.convert_to_tensor(p.reshape(tuple(t.shape)), dtype=t.dtype) for p, t in zip(parts, like, strict=True)]


def numbers(x):
    """A tensor in NumPy, in double precision."""
    return np.asarray(ops.convert_to_numpy(ops.cast(x, "float32") if _is_short(x) else x), "float64")


def _is_short(x):
    return validation.dtype_of(x) in ("float16", "bfloat16")
