"""Norms of gradients, one for each example, and the directions in which they are reached."""

import keras
from keras import ops


def rows(gradients):
    """Gradients of shape `(batch, ...)` side by side: `(batch, elements of one example)`, at least in float32."""
    flat = [ops.reshape(at_least_single(g), (ops.shape(g)[0], -1)) for g in gradients]
    return flat[0] if len(flat) == 1 else ops.concatenate(flat, axis=1)


def norms_and_directions(g, order):
    r"""The norms of the rows, and for each the $d$ with $d \cdot g$ its norm, of length 1 in the dual norm: constants.

    Both are 0 where the row is.
    """
    g = ops.stop_gradient(g)
    if order == 1:
        return norms(g, 1), ops.sign(g)
    if order == "inf":
        largest = ops.one_hot(ops.argmax(ops.abs(g), axis=1), g.shape[1], dtype=g.dtype)
        return norms(g, "inf"), largest * ops.sign(g)
    scale = _scale(g)
    scaled = g / scale
    length = ops.sqrt(ops.sum(ops.square(scaled), axis=1, keepdims=True))
    # The length is 1 or more, or 0 where the row is.
    return (scale * length)[:, 0], scaled / ops.maximum(length, 1.0)


def norms(g, order):
    """The l1, l2 or l-infinity norm (`order` 1, 2 or "inf") of each row; its derivative is 0 where the row is."""
    if order == 1:
        return ops.sum(magnitude(g), axis=1)
    if order == "inf":
        return ops.max(magnitude(g), axis=1)
    scale = _scale(g)
    return scale[:, 0] * root(ops.sum(ops.square(g / scale), axis=1))


def at_least_single(x):
    """`x` in float32, or in float64 if it is."""
    return ops.cast(x, keras.backend.result_type(x.dtype, "float32"))


def magnitude(x):
    """The absolute value, whose derivative is 0 at 0; that of JAX is 1 there."""
    return x * ops.stop_gradient(ops.sign(x))


def root(squares):
    """The square root, whose derivative is 0 at 0."""
    is_positive = squares > 0
    return ops.where(is_positive, ops.sqrt(ops.where(is_positive, squares, 1.0)), 0.0)


def _scale(g):
    # The squares of small gradients would be rounded to zero.
    largest = ops.max(ops.abs(ops.stop_gradient(g)), axis=1, keepdims=True)
    return ops.where(largest > 0, largest, 1.0)
