"""One damped step of Newton's method that goes down, or none."""

import enum
from typing import Any, NamedTuple

import numpy as np

from keras_gradtools.curvature.conjugate_gradients import conjugate_gradients
from keras_gradtools.curvature.damped_solve import damped_solve
from keras_gradtools.curvature.gauss_newton import GaussNewton
from keras_gradtools.curvature.hessian import Hessian
from keras_gradtools.curvature.krylov_basis import dot, norm

CURVATURES = {"hessian": Hessian, "gauss_newton": GaussNewton}

# Of the loss, in units of its precision: what a difference of two losses has to exceed to be one.
_ROUNDING = 16.0
# A prediction so many times above that, of which nothing is seen, was wrong.
_RESOLVED = 4.0
# The decrease by gradients is believed where it is off from the predicted one by at most this share.
_AGREEING = 0.25
# Where what is left to gain is below rounding, so many dampings are tried, each growing faster: in all by 2**15.
_POLISHING_ATTEMPTS = 6
# Nielsen's factors of the damping after a step.
_LEAST_FACTOR, _FIRST_GROWTH = 1.0 / 3.0, 2.0
# Of the largest entry of the curvature: the first damping after none.
_SMALLEST_SHARE = 1e-6
# Iterates of conjugate gradients are kept whose numbers are so many times apart.
_KEPT_APART = 1.5
# Nocedal & Wright's forcing term: the residual of the equation over the gradient is at most this, or its root.
_LARGEST_RESIDUAL = 0.5


def require_enough_outputs(owner, operator, examples):
    """Raises `ValueError` where the examples have fewer outputs than there are weights."""
    weights, outputs = operator.shape[0], operator.outputs_of_example()
    if outputs is not None and examples * outputs < weights:
        raise ValueError(
            f"{owner} forms the matrix of {weights} weights, and fewer outputs cannot determine it. Received: "
            f"{examples} examples with {outputs} outputs each. Take at least {-(-weights // outputs)} examples at a "
            "time, fewer variables, or a method by conjugate gradients; or pass `allow_underdetermined=True` to leave "
            "what is undetermined to the damping."
        )


class StepReason(enum.IntEnum):
    """How a step ended; a number, so that it can be logged with the others."""

    ACCEPTED = 0
    REJECTED = 1
    VANISHED = 2
    NOT_FINITE = 3


class NewtonStepResult(NamedTuple):
    """What a step came to.

    Attributes:
        reason: a `StepReason`: `ACCEPTED`; `REJECTED`, no damping that was tried led down; `VANISHED`, the gradient is
            zero to rounding; `NOT_FINITE`, the loss, its gradient or its curvature has NaN or infinity.
        message: the same in words.
        step: the step, a NumPy array; None if there is none.
        loss: before the step.
        decrease: of the loss by the step.
        ratio: that over what the quadratic model predicted; NaN if there is no step.
        gradient_norm: before the step.
        damping: for the next step.
        step_length: the length of the step, 0 if there is none.
        iterations: of conjugate gradients, in all attempts.
        attempts: how many dampings were tried.
    """

    reason: StepReason
    message: str
    step: np.ndarray | None
    loss: float
    decrease: float
    ratio: float
    gradient_norm: float
    damping: float
    step_length: float
    iterations: int
    attempts: int


def newton_step(objective, solver, damping, *, scale=1.0, max_attempts=10):
    r"""Finds a step $p = -s \, (B + \lambda I)^{-1} g$ that lowers the loss, with as much damping as that needs.

    A step is accepted if the loss went down, and never otherwise. Where the difference of the two losses is below
    their rounding, it is taken from the gradients at both ends, $-\frac12 (g_0 + g_1)^\top p$; the gradient must have
    become shorter, too, or that number be the predicted one, but for a quarter.

    The damping follows Nielsen's rule: with $\rho$ the decrease over that of the quadratic model, an accepted step
    multiplies it by $\max(\frac13, 1 - (2 \rho - 1)^3)$, and the rejected ones in a row by 2, 4, 8, ... A shorter step
    of the solver's, accepted in the place of a rejected one, counts as rejected there.

    Args:
        objective: has `loss(offset)` and `loss_and_gradient(offset)`, at the weights plus a NumPy vector; `offset` may
            be None.
        solver: has `solve(gradient, damping)`, which returns a `Proposal`.
        damping: $\lambda$, 0 or more.
        scale: $s$, above 0.
        max_attempts: how many dampings are tried.

    Returns:
        A `NewtonStepResult`. The weights are not changed: that is up to who takes the step.

    Source: Nielsen, "Damping parameter in Marquardt's method" (1999), equation 2.4; the decrease by gradients is in
    the spirit of Hager & Zhang, "A new conjugate gradient method with guaranteed descent" (2005), section 4.
    """
    loss, gradient = solver.start(objective)
    length = norm(gradient)
    first_damping, iterations, growth = damping, 0, _FIRST_GROWTH

    def ended(reason, message, damping=damping, attempts=0):
        return NewtonStepResult(
            reason, message, None, loss, 0.0, float("nan"), length, float(damping), 0.0, iterations, attempts
        )

    if not np.isfinite(loss) or not np.isfinite(length):
        what = "loss" if not np.isfinite(loss) else "gradient"
        return ended(StepReason.NOT_FINITE, f"the {what} is not finite")
    if length == 0.0:
        return ended(StepReason.VANISHED, "the gradient is zero")
    rounding = _ROUNDING * float(np.finfo(solver.dtype).eps) * abs(loss)
    for attempt in range(1, max_attempts + 1):
        proposal = solver.solve(gradient, damping)
        iterations += proposal.iterations
        if proposal.step is None:
            return ended(StepReason.NOT_FINITE, "the curvature is not finite", attempts=attempt)
        damping = max(damping, proposal.damping)
        candidates = [(proposal.step, proposal.slope, proposal.curved), *proposal.shorter]
        promised = 0.0
        for place, (step, slope, curved) in enumerate(candidates):
            # In the precision of the weights, as it will be added to them.
            step = (scale * step).astype(solver.dtype)
            predicted = -scale * slope - 0.5 * scale**2 * curved
            promised = max(promised, predicted)
            decrease = _decrease(objective, loss, gradient, step, predicted, rounding)
            if decrease > 0.0:
                ratio = decrease / predicted if predicted > 0.0 else 1.0
                factor = growth if place else max(_LEAST_FACTOR, 1.0 - (2.0 * min(ratio, 1.0) - 1.0) ** 3)
                damping = max(damping * factor, proposal.least_damping)
                return NewtonStepResult(
                    StepReason.ACCEPTED, "the loss went down", step, loss, decrease, ratio, length, float(damping),
                    norm(step), iterations, attempt,
                )  # fmt: skip
        if promised <= rounding and attempt >= _POLISHING_ATTEMPTS:
            return ended(StepReason.VANISHED, "what a step can gain is below rounding", first_damping, attempt)
        damping = max(damping * growth, _SMALLEST_SHARE * proposal.size)
        growth *= 2.0
    return ended(StepReason.REJECTED, f"the loss went up with {max_attempts} dampings", damping, max_attempts)


def _decrease(objective, loss, gradient, step, predicted, rounding):
    """By how much the loss goes down for certain; zero or less where it does not, NaN where it is not finite."""
    decrease = loss - objective.loss(step)
    if not np.isfinite(decrease) or abs(decrease) > rounding:
        return decrease
    if predicted > _RESOLVED * rounding:
        # What was promised would have been seen.
        return 0.0
    _, there = objective.loss_and_gradient(step)
    decrease = -0.5 * (dot(gradient, step) + dot(there, step))
    if norm(there) < norm(gradient) or abs(decrease - predicted) <= _AGREEING * predicted:
        return decrease
    return 0.0


class Proposal(NamedTuple):
    r"""A step before it was tried: None if a number is not finite.

    `slope` is $g^\top p$ and `curved` $p^\top B p$, of which the quadratic model consists; `damping` is what the step
    was damped by, and `size` one of the matrix. `shorter` has other steps, each with its slope and what is curved in
    it, to be tried in this order where the loss does not go down; `least_damping` is what the next step needs.
    """

    step: np.ndarray | None
    slope: float
    curved: float
    damping: float
    iterations: int
    size: float
    shorter: tuple = ()
    least_damping: float = 0.0


class DenseSolver:
    """Newton's equation by factorizing the matrix, in double precision.

    Args:
        system: a function of nothing, which returns the loss, its gradient and the matrix.
        dtype: of the weights.
        scaling: `"identity"`, or `"diagonal"` for Marquardt's damping, by the diagonal of the matrix.
    """

    def __init__(self, system, dtype, scaling="identity"):
        self._system, self.dtype, self._scaling = system, np.dtype(dtype), scaling

    def start(self, objective):
        loss, gradient, self._matrix = self._system()
        self._is_finite = bool(np.isfinite(self._matrix).all())
        self._largest = float(np.abs(self._matrix).max(initial=0.0)) if self._is_finite else 0.0
        return loss, np.asarray(gradient, "float64")

    def solve(self, gradient, damping):
        if not self._is_finite:
            return Proposal(None, 0.0, 0.0, damping, 0, 0.0)
        matrix, right, scale = self._matrix, -gradient, None
        if self._scaling == "diagonal":
            diagonal = np.abs(np.diag(matrix)).astype("float64")
            scale = 1.0 / np.sqrt(np.maximum(diagonal, _SMALLEST_SHARE * (self._largest or 1.0)))
            matrix, right = scale[:, None] * matrix * scale, scale * right
        solution = damped_solve(matrix, right, damping)
        step = solution.x if scale is None else scale * solution.x
        curved = dot(step, self._matrix @ step)
        size = self._largest if scale is None else 1.0
        return Proposal(step, dot(gradient, step), curved, solution.damping, 0, size)


class ConjugateGradientsSolver:
    """Newton's equation by products alone.

    A direction of negative curvature ends the iteration: the step is what was found before it, or, at once, the
    first direction at the length that its curvature has in absolute value (Nocedal & Wright, algorithm 7.1).

    Args:
        operator: a curvature operator, of which `linearized()` is used.
        max_iterations: products for each damping.
        rtol: of the residual over the gradient; None for the smaller of 1/2 and the root of the gradient's length.
        progress_tol: of `kg.curvature.conjugate_gradients`.
        preconditioner: a `RecycledPreconditioner`, which learns from each system; None for none.
    """

    def __init__(self, operator, max_iterations, rtol=None, progress_tol=None, preconditioner=None):
        self._operator, self.dtype = operator, np.dtype("float64" if operator.dtype == "float64" else "float32")
        self._max_iterations, self._rtol, self._progress_tol = max_iterations, rtol, progress_tol
        self._preconditioner = preconditioner

    def start(self, objective):
        self._linearized = None
        if self._preconditioner is not None:
            self._preconditioner.begin()
        return objective.loss_and_gradient()

    def solve(self, gradient, damping):
        if self._linearized is None:
            self._linearized = self._operator.linearized()
            if self._preconditioner is not None:
                self._linearized = _Recorded(self._linearized, self._preconditioner)
        length = norm(gradient)
        rtol = min(_LARGEST_RESIDUAL, length**0.5) if self._rtol is None else self._rtol
        kept: list[Any] = []

        def keep(i, x, value):
            if not kept or i >= _KEPT_APART * kept[-1][0]:
                kept.append((i, x, value))

        found = conjugate_gradients(
            self._linearized,
            -gradient.astype(self.dtype),
            damping=damping,
            preconditioner=None if self._preconditioner is None else self._preconditioner.of(damping),
            rtol=rtol,
            progress_tol=self._progress_tol,
            max_iterations=self._max_iterations,
            callback=keep,
        )
        if self._preconditioner is not None:
            self._preconditioner.finish()
        x = np.asarray(found.x, "float64")
        if found.reason == "not_finite" or not np.isfinite(x).all():
            return Proposal(None, 0.0, 0.0, damping, found.iterations, 0.0)
        if found.reason == "negative_curvature" and not x.any():
            # Down the first direction, to where a parabola of the same curvature upside down had its bottom.
            x = np.asarray(found.negative_curvature, "float64")
            x = -dot(gradient, x) / dot(x, x) / max(abs(found.curvature), _SMALLEST_SHARE) * x
            curved = (found.curvature - damping) * dot(x, x)
        else:
            # x'(B + damping) x = x'(b - r), and the residual r of conjugate gradients is orthogonal to x.
            curved = -dot(gradient, x) - damping * dot(x, x)
        size = length if found.curvature is None else max(length, abs(found.curvature - damping))
        shorter = []
        for i, earlier, _ in reversed(kept):
            if i < found.iterations:
                slope = dot(gradient, earlier)
                shorter.append((earlier, slope, -slope - damping * dot(earlier, earlier)))
        # So much makes the direction of negative curvature one of none.
        least = damping - found.curvature if found.reason == "negative_curvature" else 0.0
        return Proposal(x, dot(gradient, x), curved, damping, found.iterations, size, tuple(shorter), least)


class _Recorded:
    """A matrix whose products the preconditioner of the next system learns from."""

    __array_ufunc__ = None

    def __init__(self, matrix, preconditioner):
        self.shape, self._matrix, self._preconditioner = matrix.shape, matrix, preconditioner

    def __matmul__(self, vector):
        product = self._matrix @ vector
        self._preconditioner.record(vector, product)
        return product
