"""One damped Newton step that lowers the loss, or none."""

import enum
from typing import Any, NamedTuple

import numpy as np

from keras_gradtools.curvature.estimators.krylov_basis import dot, norm
from keras_gradtools.curvature.operators.gauss_newton import GaussNewton
from keras_gradtools.curvature.operators.hessian import Hessian
from keras_gradtools.curvature.operators.solver_vectors import solver_dtype
from keras_gradtools.curvature.solvers.conjugate_gradients import conjugate_gradients
from keras_gradtools.curvature.solvers.damped_solve import damped_solve

CURVATURES = {"hessian": Hessian, "gauss_newton": GaussNewton}

# A difference of two losses counts only if it is above this times the machine epsilon times the loss.
_ROUNDING = 16.0
# A predicted decrease above this many times that limit would be visible. If it is not, the step is rejected.
_RESOLVED = 4.0
# A decrease computed from gradients is trusted if it differs from the prediction by at most this share.
_AGREEING = 0.25
# If the possible decrease is below rounding, at most this many dampings are tried, which differ by up to 2**15.
_POLISHING_ATTEMPTS = 6
# Nielsen's constants for the damping: the smallest factor after an accepted step, the first one after a rejected step.
_LEAST_FACTOR, _FIRST_GROWTH = 1.0 / 3.0, 2.0
# The least damping after a rejected step, relative to the size of the curvature.
_SMALLEST_SHARE = 1e-6
# The numbers of the conjugate gradient iterates that may be tried grow at least by this factor.
_LEAST_GROWTH = 1.5
# Nocedal & Wright's forcing term: the relative residual is at most this, and at most the root of the gradient norm.
_LARGEST_RESIDUAL = 0.5


def require_enough_outputs(owner, operator, examples):
    """Raises `ValueError` if the examples have fewer outputs than there are weights."""
    weights, outputs = operator.shape[0], operator.outputs_of_example()
    if outputs is not None and examples * outputs < weights:
        raise ValueError(
            f"{owner} forms the matrix of {weights} weights, and fewer outputs cannot determine it. Received: "
            f"{examples} examples with {outputs} outputs each. Take at least {-(-weights // outputs)} examples at a "
            "time, use fewer variables, or use a method with conjugate gradients. Or pass "
            "`allow_underdetermined=True`, so that damping determines the remaining directions."
        )


class StepReason(enum.IntEnum):
    """How a step ended, as a number, so that it can be logged."""

    ACCEPTED = 0
    REJECTED = 1
    VANISHED = 2
    NOT_FINITE = 3


class NewtonStepResult(NamedTuple):
    """The result of a step.

    Attributes:
        reason: A `StepReason`: `ACCEPTED`; `REJECTED`, if no damping that was tried lowered the loss; `VANISHED`, if
            the gradient is zero to rounding; `NOT_FINITE`, if the loss, its gradient or its curvature has NaN or
            infinity.
        message: The reason in words.
        step: The step, a NumPy array. None if no step was found.
        loss: The loss before the step.
        decrease: The decrease of the loss by the step, 0 without a step.
        ratio: `decrease` over the decrease that the quadratic model predicted. NaN without a step.
        gradient_norm: The norm of the gradient before the step.
        damping: The damping for the next step.
        step_length: The norm of the step, 0 without a step.
        iterations: Number of conjugate gradient iterations, over all attempts.
        attempts: Number of dampings that were tried.
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

    def logs(self):
        """The entries for the logs of `fit` that the model and the callback share."""
        return {
            "damping": self.damping,
            "step_length": self.step_length,
            "ratio": self.ratio,
            "cg_iterations": self.iterations,
            "step_reason": int(self.reason),
        }


def newton_step(objective, solver, damping, *, scale=1.0, max_attempts=10):
    r"""Finds a step $p = -s \, (B + \lambda I)^{-1} g$ that lowers the loss, and raises the damping until it does.

    A step is accepted only if the loss went down. If the difference of the two losses is below rounding, the decrease
    is computed from the gradients before and after the step, $-\frac12 (g_0 + g_1)^\top p$. It then counts only if the
    norm of the gradient went down, or if it agrees with the predicted decrease to 25%.

    The damping follows Nielsen's rule. With $\rho$ the decrease over the decrease of the quadratic model, an accepted
    step multiplies the damping by $\max(\frac13, 1 - (2 \rho - 1)^3)$. Consecutive rejected steps multiply it by 2, 4,
    8, ... If one of the solver's shorter steps is accepted instead of the full step, the damping grows as after a
    rejected step.

    Args:
        objective: An object with `loss(offset)` and `loss_and_gradient(offset)`, at the weights plus a NumPy vector
            `offset` or None.
        solver: An object with `dtype`, `start(objective)`, which returns the loss and the gradient, and
            `solve(gradient, damping)`, which returns a `Proposal`.
        damping: $\lambda$, 0 or more.
        scale: $s$, above 0.
        max_attempts: Maximum number of dampings that are tried.

    Returns:
        A `NewtonStepResult`. The weights do not change. The caller applies the step.

    Source: Nielsen, "Damping parameter in Marquardt's method" (1999), equation 2.4; the decrease from gradients is in
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
            # In the precision of the weights, to which it will be added.
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
            return ended(StepReason.VANISHED, "the possible decrease is below rounding", first_damping, attempt)
        damping = max(damping * growth, _SMALLEST_SHARE * proposal.size)
        growth *= 2.0
    return ended(StepReason.REJECTED, f"the loss went up with {max_attempts} dampings", damping, max_attempts)


def _decrease(objective, loss, gradient, step, predicted, rounding):
    """The decrease of the loss, as far as rounding allows: 0 or less if none is certain."""
    decrease = loss - objective.loss(step)
    if not np.isfinite(decrease) or abs(decrease) > rounding:
        return decrease
    if predicted > _RESOLVED * rounding:
        # The predicted decrease would have been visible.
        return 0.0
    _, there = objective.loss_and_gradient(step)
    decrease = -0.5 * (dot(gradient, step) + dot(there, step))
    if norm(there) < norm(gradient) or abs(decrease - predicted) <= _AGREEING * predicted:
        return decrease
    return 0.0


class Proposal(NamedTuple):
    r"""A step that was not tried yet.

    Attributes:
        step: The step $p$. None if a number is not finite.
        slope: $g^\top p$, the linear term of the quadratic model.
        curved: $p^\top B p$, twice the quadratic term.
        damping: The damping of the step.
        iterations: Number of conjugate gradient iterations.
        size: A scale of the matrix, to which the least damping is relative.
        shorter: Other steps, as `(step, slope, curved)`, to try in this order if the loss does not go down.
        least_damping: The least damping for the next step.
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
    """Solves Newton's equation by factorizing the matrix, in double precision.

    Args:
        system: A function without arguments that returns the loss, its gradient and the matrix.
        dtype: The dtype of the weights.
        scaling: `"identity"`, or `"diagonal"` for Marquardt's damping with the diagonal of the matrix.
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
    """Solves Newton's equation by conjugate gradients, using only products.

    A direction of negative curvature ends the iteration, and the step is the iterate before it. If the first direction
    has negative curvature, the step goes along that direction, to the minimum of a parabola with the absolute value of
    the curvature. See Nocedal & Wright, algorithm 7.1.

    Args:
        operator: A curvature operator. Its `linearized()` is used.
        max_iterations: Maximum number of products for each damping.
        rtol: Tolerance for the residual relative to the gradient. None for the smaller of 1/2 and the square root of
            the norm of the gradient.
        progress_tol: As for `kg.curvature.conjugate_gradients`.
        preconditioner: A `RecycledPreconditioner`, which learns from every system. None for no preconditioner.
    """

    def __init__(self, operator, max_iterations, rtol=None, progress_tol=None, preconditioner=None):
        self._operator, self.dtype = operator, solver_dtype(operator.dtype)
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
        iterates: list[Any] = []

        def store(i, x, value):
            if not iterates or i >= _LEAST_GROWTH * iterates[-1][0]:
                iterates.append((i, x, value))

        found = conjugate_gradients(
            self._linearized,
            -gradient.astype(self.dtype),
            damping=damping,
            preconditioner=None if self._preconditioner is None else self._preconditioner.of(damping),
            rtol=rtol,
            progress_tol=self._progress_tol,
            max_iterations=self._max_iterations,
            callback=store,
        )
        if self._preconditioner is not None:
            self._preconditioner.finish()
        x = np.asarray(found.x, "float64")
        if found.reason == "not_finite" or not np.isfinite(x).all():
            return Proposal(None, 0.0, 0.0, damping, found.iterations, 0.0)
        if found.reason == "negative_curvature" and not x.any():
            # The minimum along the first direction, of a parabola with the absolute value of its curvature.
            x = np.asarray(found.negative_curvature, "float64")
            x = -dot(gradient, x) / dot(x, x) / max(abs(found.curvature), _SMALLEST_SHARE) * x
            curved = (found.curvature - damping) * dot(x, x)
        else:
            # x'(B + damping) x = x'(b - r), and the residual r of conjugate gradients is orthogonal to x.
            curved = -dot(gradient, x) - damping * dot(x, x)
        size = length if found.curvature is None else max(length, abs(found.curvature - damping))
        shorter = []
        for i, earlier, _ in reversed(iterates):
            if i < found.iterations:
                slope = dot(gradient, earlier)
                shorter.append((earlier, slope, -slope - damping * dot(earlier, earlier)))
        # The smallest damping that removes this negative curvature.
        least = damping - found.curvature if found.reason == "negative_curvature" else 0.0
        return Proposal(x, dot(gradient, x), curved, damping, found.iterations, size, tuple(shorter), least)


class _Recorded:
    """A matrix that passes its products on to the preconditioner, which learns from them for the next system."""

    __array_ufunc__ = None

    def __init__(self, matrix, preconditioner):
        self.shape, self._matrix, self._preconditioner = matrix.shape, matrix, preconditioner

    def __matmul__(self, vector):
        product = self._matrix @ vector
        self._preconditioner.record(vector, product)
        return product
