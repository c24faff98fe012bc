"""Conjugate gradients as a loop inside one compiled program.

It computes what `conjugate_gradients` does, with the same tests in the same order. All numbers have the precision of
the vectors, and dot products are rounded to it once.
"""

import functools
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_gradtools import backend
from keras_gradtools.curvature.estimators.krylov_basis import dot, norm, tensor_norm
from keras_gradtools.curvature.solvers import conjugate_gradients as on_the_host

# The reasons of a `ConjugateGradientsResult`, as numbers.
_RUNNING, _CONVERGED, _PROGRESS, _NEGATIVE, _LIMIT, _NOT_FINITE, _INDEFINITE = range(7)
_REASONS = {
    _CONVERGED: "converged",
    _PROGRESS: "progress",
    _NEGATIVE: "negative_curvature",
    _LIMIT: "max_iterations",
    _NOT_FINITE: "not_finite",
}


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
    """

    limit: int
    progress_tol: float | None
    most: int
    stored: tuple
    records: bool


class _State(NamedTuple):
    """What an iteration needs of the former ones. The vectors are those of the equation divided by a power of two.

    Attributes:
        i: Number of iterations.
        reason: Why it stopped, or `_RUNNING`.
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


def solve(run, b, damping, rtol, options, preconditioner=None, record=None):
    r"""Solves $(A + \lambda I) x = b$.

    Args:
        run: A function of a key, a function and its arguments. It runs `function(product, *arguments)` compiled, where
            `product` multiplies A by a vector.
        b: A NumPy vector, not zero and finite.
        damping: As for `conjugate_gradients`.
        rtol: As for `conjugate_gradients`.
        options: The `Options`.
        preconditioner: A `Preconditioner` of NumPy arrays. None for none.
        record: A function of a direction and its product with A. It is called for all of them, in order.

    Returns:
        A `ConjugateGradientsResult`, and the stored iterates as pairs of a number and an x, in ascending order.
    """
    length = norm(b)
    # A power of two is exact, and keeps squares of short and long vectors within the range of single precision.
    scale = 2.0 ** np.floor(np.log2(length))
    b, length = (b / scale).astype(b.dtype), length / scale
    direction = b if preconditioner is None else preconditioner.times(b)
    number = b.dtype.type
    state = _State(
        np.int32(0),
        np.int32(_RUNNING),
        np.zeros_like(b),
        b,
        direction,
        number(dot(b, direction)),
        number(length),
        number(0.0),
        np.zeros(options.limit + 1, b.dtype),
        np.zeros((len(options.stored) + 1, len(b)), b.dtype),
    )
    numbers = np.array([damping, rtol * length], b.dtype)
    given = None if preconditioner is None else tuple(preconditioner)
    while state.reason == _RUNNING:
        body = functools.partial(_iterations, options)
        found = run(("conjugate gradients", options), body, b, numbers, given, tuple(state))
        taken, *found, directions, products = (ops.convert_to_numpy(x) for x in found)
        state = _State(*found)
        for place in range(int(taken) if options.records else 0):
            record(directions[place], products[place])
    return _result(state, scale), _iterates(state, options, scale)


def _result(state, scale):
    reason = int(state.reason)
    if reason == _INDEFINITE:
        raise on_the_host.not_positive_definite(float(state.slope) * scale**2)
    direction = curvature = None
    if reason == _NEGATIVE:
        direction = state.direction.astype("float64")
        curvature = float(state.curvature) / dot(direction, direction)
    x, length = scale * state.x.astype("float64"), scale * float(state.length)
    return on_the_host.ConjugateGradientsResult(x, _REASONS[reason], int(state.i), length, direction, curvature)


def _iterates(state, options, scale):
    is_last = int(state.reason) in (_NEGATIVE, _INDEFINITE)
    known = [i for i in options.stored if i <= int(state.i) - is_last]
    return [(i, (scale * x).astype(x.dtype)) for i, x in zip(known, state.iterates, strict=False)]


def _iterations(options, product, b, numbers, given, state):
    """Iterates until a test ends the iteration, at most `options.most` times."""
    state = _State(*map(ops.convert_to_tensor, state))
    b, numbers = ops.convert_to_tensor(b), ops.convert_to_tensor(numbers)
    precondition = _as_it_is if given is None else Preconditioner(*map(ops.convert_to_tensor, given)).times
    rows = options.most if options.records else 1
    recorded = [ops.zeros((rows, *b.shape), dtype=b.dtype)] * 2

    def is_running(taken, i, reason, *_):
        return ops.logical_and(ops.equal(reason, _RUNNING), taken < options.most)

    def iterate(taken, *found):
        *given, directions, products = found
        former = _State(*given)
        undamped = product(former.direction)
        if options.records:
            directions = _with_row(directions, taken, former.direction)
            products = _with_row(products, taken, undamped)
        curved = undamped + numbers[0] * former.direction
        following = _next(options, b, former, curved, numbers[1], precondition)
        return (taken + 1, *following, directions, products)

    return list(ops.while_loop(is_running, iterate, (ops.zeros((), "int32"), *state, *recorded)))


def _next(options, b, former, curved, threshold, precondition):
    """The `_State` after an iteration, where `curved` is the product of the direction."""
    i, _, x, residual, direction, slope, *_ = former
    curvature = backend.dot(direction, curved)
    is_finite, is_indefinite = ops.isfinite(curvature), slope < 0
    least = on_the_host.ROUNDING * float(np.finfo(keras.backend.standardize_dtype(x.dtype)).eps)
    # A curvature that is zero within rounding error counts as zero.
    is_negative = curvature <= least * tensor_norm(direction) * tensor_norm(curved)
    is_ended = ops.logical_or(ops.logical_or(ops.logical_not(is_finite), is_indefinite), is_negative)
    i = i + ops.cast(is_finite, "int32")
    step = slope / curvature
    x = ops.where(is_ended, x, x + step * direction)
    residual = ops.where(is_ended, residual, residual - step * curved)
    length = tensor_norm(residual)
    values, is_slow = former.values, ops.zeros((), "bool")
    if options.progress_tol:
        values = _with_row(values, i, -0.5 * (backend.dot(b, x) + backend.dot(residual, x)))
        is_slow = _is_slow(values, i, options.progress_tol)
    # The last row takes the iterates that are not stored.
    places = np.full(options.limit + 1, len(options.stored), "int32")
    places[list(options.stored)] = np.arange(len(options.stored))
    place = ops.where(is_ended, len(options.stored), ops.take(ops.convert_to_tensor(places), i))
    iterates = _with_row(former.iterates, place, x)
    preconditioned = precondition(residual)
    after = backend.dot(residual, preconditioned)
    reason = _first_true(
        (ops.logical_not(is_finite), _NOT_FINITE),
        (is_indefinite, _INDEFINITE),
        (is_negative, _NEGATIVE),
        (is_slow, _PROGRESS),
        (ops.logical_not(ops.logical_and(ops.isfinite(length), ops.isfinite(after))), _NOT_FINITE),
        # A residual so short that its square is zero is as good as zero.
        (ops.logical_or(length <= threshold, ops.equal(after, 0)), _CONVERGED),
        (ops.equal(i, options.limit), _LIMIT),
    )
    direction = ops.where(is_ended, direction, preconditioned + after / slope * direction)
    slope = ops.where(is_ended, slope, after)
    return _State(i, reason, x, residual, direction, slope, length, curvature, values, iterates)


def _is_slow(values, i, tol):
    k = ops.maximum(on_the_host.LEAST_WINDOW, i // on_the_host.WINDOW_PARTS)
    last = ops.take(values, i)
    gained = (last - ops.take(values, ops.maximum(i - k, 0))) / last
    is_less = gained < tol * ops.cast(k, values.dtype)
    return ops.logical_and(ops.logical_and(i > k, last < 0), is_less)


def _first_true(*cases):
    found = ops.convert_to_tensor(np.int32(_RUNNING))
    for condition, number in reversed(cases):
        found = ops.where(condition, ops.convert_to_tensor(np.int32(number)), found)
    return found


def _with_row(array, place, row):
    return ops.scatter_update(array, ops.reshape(place, (1, 1)), ops.expand_dims(row, 0))


def _as_it_is(v):
    return v
