"""One damping of a Newton step as one program: the gradient, conjugate gradients, and the losses of their iterates.

Python reads a few numbers and the step. The other vectors stay on the device of the model.
"""

import functools
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_gradtools import backend
from keras_gradtools.curvature.estimators.krylov_basis import tensor_norm
from keras_gradtools.curvature.solvers import conjugate_gradient_loop as loop
from keras_gradtools.curvature.solvers.conjugate_gradients import not_positive_definite
from keras_gradtools.second_order.newton_equation import SMALLEST_SHARE

# Nocedal & Wright's forcing term: the relative residual is at most this, and at most the root of the gradient norm.
LARGEST_RESIDUAL = 0.5
# A difference of two losses counts only if it is above this times the machine epsilon times the loss.
ROUNDING = 16.0
# A predicted decrease above this many times that limit should be visible. If it is not, the step is rejected.
RESOLVED = 4.0


class Iterate(NamedTuple):
    r"""A step $p$ to try, and what is known of it.

    Attributes:
        step: A function without arguments that returns the step times the scale, a NumPy array in the precision of the
            weights, to which it will be added.
        slope: $g^\top p$, the linear term of the quadratic model.
        curved: $p^\top B p$, twice the quadratic term.
        loss: The loss at the weights plus what `step` returns. None if it is not known.
    """

    step: Any
    slope: float
    curved: float
    loss: float | None = None


class Solved(NamedTuple):
    """What a program has found for one damping.

    Attributes:
        loss: The loss at the weights.
        gradient: The gradient there, a NumPy array.
        length: The norm of the gradient.
        reason: A reason of `conjugate_gradient_loop`.
        iterations: Number of iterations.
        residual_norm: The norm of the last residual.
        curvature: The curvature of a negative direction over its squared norm. None if there was none.
        iterates: The solution and earlier iterates, each an `Iterate`, in the order in which they are to be tried. None
            if a number is not finite.
    """

    loss: float
    gradient: np.ndarray
    length: float
    reason: int
    iterations: int
    residual_norm: float
    curvature: float | None
    iterates: list | None


class _Start(NamedTuple):
    """What all calls of the program for one damping share.

    Attributes:
        loss: The loss at the weights.
        power: A power of two. The vectors of the equation are those of the weights divided by it.
        b: The negative gradient divided by `power`.
        length: The norm of b.
        threshold: The norm of the residual at which the iteration ends.
    """

    loss: Any
    power: Any
    b: Any
    length: Any
    threshold: Any


class _Numbers(NamedTuple):
    """The numbers that Python reads, in the precision of the vectors. They are followed by those of the iterates."""

    loss: Any
    power: Any
    length: Any
    reason: Any
    iterations: Any
    taken: Any
    residual_norm: Any
    slope: Any
    curvature: Any
    squared: Any
    is_finite: Any
    tried: Any


def solve(run, damping, scale, options, dtype, preconditioner=None, record=None):
    r"""Solves $(B + \lambda I) p = -g$, and evaluates the loss at p and at earlier iterates until one is lower.

    Args:
        run: A function of a key, a function and its arguments. It runs `function(product, loss_at, loss_and_gradient,
            *arguments)` compiled. `product` multiplies B by a vector, `loss_at` returns the loss at the weights plus a
            vector, and `loss_and_gradient` takes nothing.
        damping: $\lambda$.
        scale: What a step is multiplied by.
        options: The `conjugate_gradient_loop.Options`.
        dtype: The NumPy dtype of the vectors.
        preconditioner: A `Preconditioner` of arrays or tensors. None for none.
        record: A function of the directions, divided by their norms, and their products with B: arrays with a row for
            each, in order.

    Returns:
        A `Solved`.
    """
    given = None if preconditioner is None else tuple(preconditioner)
    numbers = np.array([damping, scale], dtype)
    found = run(("newton", options), functools.partial(_first, options), numbers, given)
    while True:
        read, gradient, step, x, directions, products, start, state = found
        read = backend.viewed(read).astype("float64")
        count = len(_Numbers._fields)
        known = _Numbers(*read[:count].tolist())
        if options.records and known.taken:
            taken = int(known.taken)
            record(backend.viewed(directions)[:taken], backend.viewed(products)[:taken])
        if known.reason != loop.RUNNING:
            break
        rest = functools.partial(_rest, options)
        found = run(("newton, continued", options), rest, numbers, given, gradient, start, state)
    if known.reason == loop.INDEFINITE:
        raise not_positive_definite(known.slope * known.power**2)
    curvature = known.curvature / known.squared if known.reason == loop.NEGATIVE else None
    iterates = None
    if known.is_finite and known.reason != loop.NOT_FINITE:
        rows = read[count:].reshape(3, -1)
        iterates = _iterates(known, rows, damping, scale, curvature, options, step, x, loop.State(*state).iterates)
    return Solved(
        known.loss,
        backend.viewed(gradient),
        known.power * known.length,
        int(known.reason),
        int(known.iterations),
        known.power * known.residual_norm,
        curvature,
        iterates,
    )


def _iterates(known, rows, damping, scale, curvature, options, step, x, stored):
    square = known.power**2
    losses, slopes, squares = rows
    earlier = [place for place, i in enumerate(options.stored) if i < known.iterations]
    found = []
    for place, row in enumerate([-1, *reversed(earlier)]):
        slope, length = -square * slopes[row], square * squares[row]
        # x'(B + damping) x = x'(b - r), and the residual r of conjugate gradients is orthogonal to x.
        curved = -slope - damping * length
        if place == 0 and curvature is not None and known.iterations == 1:
            curved = (curvature - damping) * length
        is_tried, is_last = place < known.tried, place == known.tried - 1
        if is_last:
            at = functools.partial(backend.viewed, step)
        else:
            at = functools.partial(_scaled, stored if place else x, row if place else ..., scale * known.power)
        found.append(Iterate(at, slope, curved, losses[place] if is_tried else None))
    return found


def _scaled(vectors, place, factor):
    vectors = backend.viewed(vectors)
    return vectors.dtype.type(factor) * vectors[place]


def _first(options, product, loss_at, loss_and_gradient, numbers, given):
    """The gradient, and the first iterations."""
    numbers, given = _tensors(numbers), _tensors(given)
    loss, gradient = loss_and_gradient()
    b = -ops.cast(gradient, numbers.dtype)
    length = tensor_norm(b)
    is_usable = ops.logical_and(ops.isfinite(loss), ops.logical_and(ops.isfinite(length), length > 0))
    # A power of two is exact, and keeps squares of short and long vectors within the range of single precision.
    power = _power_of_two(ops.where(is_usable, length, ops.ones_like(length)))
    rtol = options.rtol
    if rtol is None:
        rtol = ops.minimum(ops.cast(LARGEST_RESIDUAL, b.dtype), length**0.5)
    b, length = b / power, length / power
    start = _Start(ops.cast(loss, b.dtype), power, b, length, rtol * length)
    state = loop.started(options, b, length, _precondition(given))
    state = state._replace(reason=ops.where(is_usable, state.reason, ops.convert_to_tensor(np.int32(loop.NOT_FINITE))))
    return _continued(options, product, loss_at, numbers, given, gradient, start, state)


def _rest(options, product, loss_at, _, numbers, given, gradient, start, state):
    """More iterations."""
    numbers, given, gradient, start, state = map(_tensors, (numbers, given, gradient, start, state))
    return _continued(options, product, loss_at, numbers, given, gradient, _Start(*start), loop.State(*state))


def _continued(options, product, loss_at, numbers, given, gradient, start, state):
    damping, scale = numbers[0], numbers[1]
    taken, state, directions, products = loop.iterations(
        options, product, start.b, damping, start.threshold, _precondition(given), state
    )
    squared = backend.dot(state.direction, state.direction)
    is_negative = ops.equal(state.reason, loop.NEGATIVE)
    is_first = ops.logical_and(is_negative, ops.equal(state.i, 1))
    # The minimum along the first direction, if the sign of its curvature is changed.
    size = ops.maximum(ops.abs(state.curvature / squared), ops.cast(SMALLEST_SHARE, squared.dtype))
    x = ops.where(is_first, backend.dot(start.b, state.direction) / squared / size * state.direction, state.x)
    # Without the row for those that are not stored, and with the solution at the end.
    rows = [*(state.iterates[place] for place in range(len(options.stored))), x]
    products_of = backend.dots([(start.b, row) for row in rows] + [(row, row) for row in rows])
    slopes, squares = ops.split(ops.sum(products_of, axis=0), 2)
    is_finite = ops.all(ops.isfinite(x))
    # As in `_iterates`, in single precision: it only decides which losses are evaluated.
    curved = slopes - damping * squares
    of_first = (state.curvature / squared - damping) * squares
    curved = ops.where(is_first, of_first, curved)
    predicted = start.power * (start.power * (scale * slopes - 0.5 * scale**2 * curved))
    stored = ops.convert_to_tensor(np.array(options.stored, "int32"))
    count = ops.sum(ops.cast(stored < state.i, "int32")) + 1
    is_running = ops.equal(state.reason, loop.RUNNING)
    is_tried = ops.logical_and(is_finite, ops.logical_not(ops.logical_or(is_running, _is_useless(state.reason))))
    count = ops.where(is_tried, count, ops.zeros_like(count))
    factor = scale * start.power
    losses, step, tried = _tried(options, loss_at, start, factor, x, state.iterates, predicted, count)
    found = _Numbers(
        start.loss, start.power, start.length, state.reason, state.i, taken, state.length, state.slope, state.curvature,
        squared, is_finite, tried,
    )  # fmt: skip
    found = ops.stack([ops.cast(number, x.dtype) for number in found])
    read = ops.concatenate([found, losses, slopes, squares])
    return [read, gradient, step, x, directions, products, tuple(start), tuple(state)]


def _is_useless(reason):
    return ops.logical_or(ops.equal(reason, loop.NOT_FINITE), ops.equal(reason, loop.INDEFINITE))


def _tried(options, loss_at, start, factor, x, stored, predicted, count):
    """The losses of the iterates, up to the first one that is lower, or of which rounding hides whether it is lower.

    Returns the losses, the last step that was evaluated, and the number of losses.
    """
    limit = ROUNDING * float(np.finfo(keras.backend.standardize_dtype(x.dtype)).eps) * ops.abs(start.loss)
    places = len(options.stored) + 1

    def is_running(place, is_found, *_):
        return ops.logical_and(place < count, ops.logical_not(is_found))

    def evaluate(place, _, step, losses):
        loss = ops.cast(loss_at(step), x.dtype)
        losses = loop.with_row(losses, place, loss)
        decrease = start.loss - loss
        # The solution is the last one, and the others follow it in descending order.
        row = ops.where(place > 0, count - 1 - place, ops.full_like(place, places - 1))
        is_hidden = ops.logical_and(ops.abs(decrease) <= limit, ops.take(predicted, row) <= RESOLVED * limit)
        is_found = ops.logical_or(decrease > limit, is_hidden)
        following = factor * ops.take(stored, ops.maximum(count - 2 - place, 0), axis=0)
        # The step is carried into the next iteration, so that the loss is that of the rounded step.
        return place + 1, is_found, ops.where(is_found, step, following), losses

    zero = ops.zeros((), "int32")
    found = ops.while_loop(
        is_running, evaluate, (zero, ops.zeros((), "bool"), factor * x, ops.zeros(places, dtype=x.dtype))
    )
    tried, _, step, losses = found
    return losses, step, tried


def _precondition(given):
    return (lambda v: v) if given is None else loop.Preconditioner(*given).times


def _power_of_two(x):
    """The largest power of two that is at most x, for numbers that are finite and above 0."""
    limits = np.finfo(keras.backend.standardize_dtype(x.dtype))
    exponents = np.arange(limits.minexp, limits.maxexp)
    # Looked up, because a compiler may round a power.
    powers = ops.convert_to_tensor(np.exp2(exponents.astype("float64")).astype(limits.dtype))
    place = ops.cast(ops.floor(ops.log2(x)), "int32") - limits.minexp
    return ops.take(powers, ops.clip(place, 0, len(exponents) - 1))


def _tensors(given):
    if given is None or isinstance(given, tuple):
        return given if given is None else tuple(map(ops.convert_to_tensor, given))
    return ops.convert_to_tensor(given)
