"""Conjugate gradients as a loop inside one compiled program.

It computes what `conjugate_gradients` does, with the same tests in the same order. All numbers have the precision of
the vectors, and dot products are rounded to it once.
"""

from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_gradtools import backend
from keras_gradtools.curvature.solvers import conjugate_gradients as on_the_host

# The reasons of a `ConjugateGradientsResult`, as numbers. The last one is that of a preconditioner that is not positive
# definite, which raises there.
RUNNING, CONVERGED, PROGRESS, NEGATIVE, LIMIT, NOT_FINITE, INDEFINITE = range(7)


class Preconditioner(NamedTuple):
    r"""$M^{-1} v = v + U^\top \operatorname{diag}(f) \, U v$ with the rows $U$ of `vectors` and $f$ in `factors`."""

    vectors: Any
    factors: Any

    def times(self, v):
        """The product with a vector: all of them NumPy arrays, or all tensors."""
        # With operators and not with `ops.matmul`, which rounds to single precision on some backends.
        coefficients = self.factors * (self.vectors @ v[:, None])[:, 0]
        return v + (coefficients[None] @ self.vectors)[0]


class Options(NamedTuple):
    """What a program is compiled for.

    Attributes:
        limit: Maximum number of iterations.
        progress_tol: As for `conjugate_gradients`.
        most: Maximum number of iterations in one call of the program.
        stored: The numbers of the iterations whose x is stored, in ascending order.
        records: Whether the directions and their products are returned.
        rtol: Tolerance for the residual relative to b. None for the smaller of 1/2 and the root of the norm of b.
    """

    limit: int
    progress_tol: float | None
    most: int
    stored: tuple
    records: bool
    rtol: float | None


class State(NamedTuple):
    """What an iteration needs of the former ones. The vectors are those of the equation divided by a power of two.

    Attributes:
        i: Number of iterations.
        reason: Why it stopped, or `RUNNING`.
        slope: r'P r for the residual r and the preconditioner P.
        length: The norm of the residual.
        curvature: The curvature of the last direction.
        values: The value of the quadratic model after each iteration, if `progress_tol` needs it.
        iterates: The stored iterates, in rows, and a row for those that are not stored.
    """

    i: Any
    reason: Any
    x: Any
    residual: Any
    direction: Any
    slope: Any
    length: Any
    curvature: Any
    values: Any
    iterates: Any


def started(options, b, length, precondition):
    """The `State` before the first iteration, for a tensor b of this norm."""
    direction = precondition(b)
    zeros, zero = ops.zeros_like(b), ops.zeros((), dtype=b.dtype)
    return State(
        ops.zeros((), "int32"),
        ops.zeros((), "int32"),
        zeros,
        b,
        direction,
        backend.dot(b, direction),
        length,
        zero,
        ops.zeros(options.limit + 1, dtype=b.dtype),
        ops.zeros((len(options.stored) + 1, *b.shape), dtype=b.dtype),
    )


def iterations(options, product, b, damping, threshold, precondition, state):
    """Iterates until a test ends the iteration, at most `options.most` times.

    Returns the number of iterations, the `State`, and the directions and their products without damping, both divided
    by the norms of the directions. If `options.records` is False, these have no meaning.
    """
    rows = options.most if options.records else 1
    recorded = [ops.zeros((rows, *b.shape), dtype=b.dtype)] * 2

    def is_running(taken, i, reason, *_):
        return ops.logical_and(ops.equal(reason, RUNNING), taken < options.most)

    def iterate(taken, *found):
        *given, directions, products = found
        former = State(*given)
        undamped = product(former.direction)
        curved = undamped + damping * former.direction
        dots, norms = backend.dots_and_norms([former.direction, curved])
        if options.records:
            directions = with_row(directions, taken, former.direction / norms[0])
            products = with_row(products, taken, undamped / norms[0])
        # A curvature that is zero within rounding error counts as zero.
        least = on_the_host.ROUNDING * float(np.finfo(keras.backend.standardize_dtype(b.dtype)).eps)
        is_negative = dots[0, 1] <= least * norms[0] * norms[1]
        following = _next(options, b, former, curved, dots[0, 1], is_negative, threshold, precondition)
        return (taken + 1, *following, directions, products)

    found = ops.while_loop(is_running, iterate, (ops.zeros((), "int32"), *state, *recorded))
    taken, *found, directions, products = found
    return taken, State(*found), directions, products


def _next(options, b, former, curved, curvature, is_negative, threshold, precondition):
    """The `State` after an iteration, where `curved` is the product of the direction."""
    i, _, x, residual, direction, slope, *_ = former
    is_finite, is_indefinite = ops.isfinite(curvature), slope < 0
    is_ended = ops.logical_or(ops.logical_or(ops.logical_not(is_finite), is_indefinite), is_negative)
    i = i + ops.cast(is_finite, "int32")
    step = slope / curvature
    x = ops.where(is_ended, x, x + step * direction)
    residual = ops.where(is_ended, residual, residual - step * curved)
    preconditioned = precondition(residual)
    dots, norms = backend.dots_and_norms([residual, preconditioned])
    length, after = norms[0], dots[0, 1]
    values, is_slow = former.values, ops.zeros((), "bool")
    if options.progress_tol:
        values = with_row(values, i, -0.5 * (backend.dot(b, x) + backend.dot(residual, x)))
        is_slow = _is_slow(values, i, options.progress_tol)
    # The last row takes the iterates that are not stored.
    places = np.full(options.limit + 1, len(options.stored), "int32")
    places[list(options.stored)] = np.arange(len(options.stored))
    place = ops.where(is_ended, len(options.stored), ops.take(ops.convert_to_tensor(places), i))
    iterates = with_row(former.iterates, place, x)
    reason = _first_true(
        (ops.logical_not(is_finite), NOT_FINITE),
        (is_indefinite, INDEFINITE),
        (is_negative, NEGATIVE),
        (is_slow, PROGRESS),
        (ops.logical_not(ops.logical_and(ops.isfinite(length), ops.isfinite(after))), NOT_FINITE),
        # A residual so short that its square is zero is as good as zero.
        (ops.logical_or(length <= threshold, ops.equal(after, 0)), CONVERGED),
        (ops.equal(i, options.limit), LIMIT),
    )
    direction = ops.where(is_ended, direction, preconditioned + after / slope * direction)
    slope = ops.where(is_ended, slope, after)
    return State(i, reason, x, residual, direction, slope, length, curvature, values, iterates)


def _is_slow(values, i, tol):
    k = ops.maximum(on_the_host.LEAST_WINDOW, i // on_the_host.WINDOW_PARTS)
    last = ops.take(values, i)
    gained = (last - ops.take(values, ops.maximum(i - k, 0))) / last
    is_less = gained < tol * ops.cast(k, values.dtype)
    return ops.logical_and(ops.logical_and(i > k, last < 0), is_less)


def _first_true(*cases):
    found = ops.convert_to_tensor(np.int32(RUNNING))
    for condition, number in reversed(cases):
        found = ops.where(condition, ops.convert_to_tensor(np.int32(number)), found)
    return found


def with_row(array, place, row):
    """The array with another row at a place."""
    return ops.scatter_update(array, ops.reshape(place, (1, 1)), ops.expand_dims(row, 0))
