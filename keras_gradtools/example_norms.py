"""Norms, directions and parts of vectors, with one vector for each example of a batch.

A vector may be spread over several tensors of shape `(batch, ...)`. `norms` and `norms_and_directions` take the
flattened vectors, of shape `(batch, n)`.
"""

import math

import keras
import numpy as np
from keras import ops

from keras_gradtools import validation


def at_least_single(x):
    """`x` cast to float32, or unchanged if it is float64."""
    return ops.cast(x, keras.backend.result_type(validation.dtype_of(x), "float32"))


def flattened(tensors):
    """Tensors of shape `(batch, ...)` as one of shape `(batch, elements of an example)`, in float32 or float64."""
    flat = [ops.reshape(at_least_single(x), (ops.shape(x)[0], -1)) for x in tensors]
    return flat[0] if len(flat) == 1 else ops.concatenate(flat, axis=1)


def split(vectors, like):
    """The inverse of `flattened` for an array: tensors of the shapes and dtypes of `like`."""
    ends = np.cumsum([math.prod(t.shape[1:]) for t in like])[:-1]
    parts = np.split(vectors, ends, axis=1)
    return [ops.convert_to_tensor(p.reshape(tuple(t.shape)), dtype=t.dtype) for p, t in zip(parts, like, strict=True)]


def for_each(values, like):
    """`values` of shape `(batch,)`, reshaped to broadcast over `like` of shape `(batch, ...)`."""
    return ops.reshape(values, (-1, *[1] * (len(like.shape) - 1)))


def scaled(values, x):
    """`x` of shape `(batch, ...)`, with each example multiplied by its number in `values`, in the dtype of `x`."""
    return for_each(ops.cast(values, x.dtype), x) * x


def squares(tensors):
    """The squared length of each example's vector, of shape `(batch,)`."""
    return sum(ops.sum(ops.square(t), axis=tuple(range(1, len(t.shape)))) for t in tensors)


def normalized(tensors):
    """The vectors divided by their lengths, or zeros where the length is zero, and the lengths."""
    length = ops.sqrt(squares(tensors))
    inverse = ops.where(length > 0, 1.0 / ops.where(length > 0, length, 1.0), 0.0)
    return [scaled(inverse, t) for t in tensors], length


def numbers(x):
    """A tensor as a NumPy array in double precision."""
    # NumPy has no bfloat16.
    return np.asarray(ops.convert_to_numpy(at_least_single(x)), "float64")


def norms(g, order):
    """The l1, l2 or l-infinity norm (`order` 1, 2 or "inf") of each vector. Its derivative is 0 at 0."""
    if order == 1:
        return ops.sum(magnitude(g), axis=1)
    if order == "inf":
        return ops.max(magnitude(g), axis=1)
    scale = _scale(g)
    return scale[:, 0] * root(ops.sum(ops.square(g / scale), axis=1))


def norms_and_directions(g, order):
    r"""The norm of each vector $g$, and its steepest direction $d$, with $d \cdot g$ the norm. Both are constants.

    $d$ has length 1 in the dual norm. Both are 0 if the vector is 0.
    """
    g = ops.stop_gradient(g)
    if order == 1:
        return norms(g, 1), ops.sign(g)
    if order == "inf":
        largest = ops.one_hot(ops.argmax(ops.abs(g), axis=1), g.shape[1], dtype=g.dtype)
        return norms(g, "inf"), largest * ops.sign(g)
    scale = _scale(g)
    divided = g / scale
    length = ops.sqrt(ops.sum(ops.square(divided), axis=1, keepdims=True))
    # The length is at least 1, or 0 if the vector is 0.
    return (scale * length)[:, 0], divided / ops.maximum(length, 1.0)


def magnitude(x):
    """The absolute value with a derivative of 0 at 0. On JAX, the derivative of `abs` is 1 there."""
    return x * ops.stop_gradient(ops.sign(x))


def root(squares):
    """The square root with a derivative of 0 at 0."""
    is_zero = ops.equal(squares, 0)
    return ops.where(is_zero, 0.0, ops.sqrt(ops.where(is_zero, 1.0, squares)))


def _scale(g):
    # Vectors are scaled, because the squares of small gradients would underflow.
    largest = ops.max(ops.abs(ops.stop_gradient(g)), axis=1, keepdims=True)
    return ops.where(largest > 0, largest, 1.0)
