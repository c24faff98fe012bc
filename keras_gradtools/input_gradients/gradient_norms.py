"""Norms of per-example gradients, and the steepest directions."""

import keras
from keras import ops


def rows(gradients):
    """Flattens gradients of shape `(batch, ...)` to `(batch, elements of an example)`, in float32 or float64."""
    flat = [ops.reshape(at_least_single(g), (ops.shape(g)[0], -1)) for g in gradients]
    return flat[0] if len(flat) == 1 else ops.concatenate(flat, axis=1)


def norms_and_directions(g, order):
    r"""The norm of each row $g$, and its steepest direction $d$, with $d \cdot g$ the norm. Both are constants.

    $d$ has length 1 in the dual norm. Both are 0 if the row is 0.
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
    # The length is at least 1, or 0 if the row is 0.
    return (scale * length)[:, 0], scaled / ops.maximum(length, 1.0)


def norms(g, order):
    """The l1, l2 or l-infinity norm (`order` 1, 2 or "inf") of each row. Its derivative is 0 if the row is 0."""
    if order == 1:
        return ops.sum(magnitude(g), axis=1)
    if order == "inf":
        return ops.max(magnitude(g), axis=1)
    scale = _scale(g)
    return scale[:, 0] * root(ops.sum(ops.square(g / scale), axis=1))


def at_least_single(x):
    """`x` cast to float32, or unchanged if it is float64."""
    return ops.cast(x, keras.backend.result_type(x.dtype, "float32"))


def magnitude(x):
    """The absolute value with a derivative of 0 at 0. On JAX, the derivative of `abs` is 1 there."""
    return x * ops.stop_gradient(ops.sign(x))


def root(squares):
    """The square root with a derivative of 0 at 0."""
    is_positive = squares > 0
    return ops.where(is_positive, ops.sqrt(ops.where(is_positive, squares, 1.0)), 0.0)


def _scale(g):
    # Rows are scaled, because the squares of small gradients would underflow.
    largest = ops.max(ops.abs(ops.stop_gradient(g)), axis=1, keepdims=True)
    return ops.where(largest > 0, largest, 1.0)
