"""One damped Newton step that lowers the loss, or none."""

import enum
from typing import NamedTuple

import numpy as np

from keras_gradtools.curvature.estimators.krylov_basis import dot, norm
from keras_gradtools.display.results import displayed
from keras_gradtools.second_order.newton_equation import SMALLEST_SHARE
from keras_gradtools.second_order.newton_program import RESOLVED, ROUNDING

# A decrease computed from gradients is trusted if it differs from the prediction by at most this share.
_AGREEING = 0.25
# If the possible decrease is below rounding, at most this many dampings are tried, which differ by up to 2**15.
_POLISHING_ATTEMPTS = 6
# Nielsen's constants for the damping: the smallest factor after an accepted step, the first one after a rejected step.
_LEAST_FACTOR, _FIRST_GROWTH = 1.0 / 3.0, 2.0


class StepReason(enum.IntEnum):
    """How a step ended, as a number, so that it can be logged."""

    ACCEPTED = 0
    REJECTED = 1
    VANISHED = 2
    NOT_FINITE = 3


@displayed
class NewtonStepResult(NamedTuple):
    """The result of a step.

    Attributes:
        reason: A `StepReason`: `ACCEPTED`; `REJECTED`, if no damping that was tried lowered the loss; `VANISHED`, if
            the gradient is zero up to rounding; `NOT_FINITE`, if the loss, its gradient or its curvature has NaN or
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

    def logs(self) -> dict[str, float]:
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
        solver: An object with `dtype`, `start(objective, damping, scale)`, which returns the loss and the gradient, and
            `solve(gradient, damping)`, which returns a `Proposal`. The first damping is that of `start`.
        damping: $\lambda$, 0 or more.
        scale: $s$, above 0.
        max_attempts: Maximum number of dampings that are tried.

    Returns:
        A `NewtonStepResult`. The weights do not change. The caller applies the step.

    Source: Nielsen, "Damping parameter in Marquardt's method" (1999), equation 2.4; the decrease from gradients is in
    the spirit of Hager & Zhang, "A new conjugate gradient method with guaranteed descent" (2005), section 4.
    """
    loss, gradient = solver.start(objective, damping, scale)
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
    rounding = ROUNDING * float(np.finfo(solver.dtype).eps) * abs(loss)
    for attempt in range(1, max_attempts + 1):
        proposal = solver.solve(gradient, damping)
        iterations += proposal.iterations
        if not proposal.iterates:
            return ended(StepReason.NOT_FINITE, "the curvature is not finite", attempts=attempt)
        damping = max(damping, proposal.damping)
        promised = 0.0
        for place, iterate in enumerate(proposal.iterates):
            predicted = -scale * iterate.slope - 0.5 * scale**2 * iterate.curved
            promised = max(promised, predicted)
            decrease = _decrease(objective, loss, gradient, iterate, predicted, rounding)
            if decrease > 0.0:
                step = iterate.step()
                ratio = decrease / predicted if predicted > 0.0 else 1.0
                factor = growth if place else max(_LEAST_FACTOR, 1.0 - (2.0 * min(ratio, 1.0) - 1.0) ** 3)
                damping = max(damping * factor, proposal.least_damping)
                return NewtonStepResult(
                    StepReason.ACCEPTED, "the loss went down", step, loss, decrease, ratio, length, float(damping),
                    norm(step), iterations, attempt,
                )  # fmt: skip
        if promised <= rounding and attempt >= _POLISHING_ATTEMPTS:
            return ended(StepReason.VANISHED, "the possible decrease is below rounding", first_damping, attempt)
        damping = max(damping * growth, SMALLEST_SHARE * proposal.size)
        growth *= 2.0
    return ended(StepReason.REJECTED, f"the loss went up with {max_attempts} dampings", damping, max_attempts)


def _decrease(objective, loss, gradient, iterate, predicted, rounding):
    """The decrease of the loss, as far as rounding allows: 0 or less if none is certain."""
    decrease = loss - (objective.loss(iterate.step()) if iterate.loss is None else iterate.loss)
    if not np.isfinite(decrease) or abs(decrease) > rounding:
        return decrease
    if predicted > RESOLVED * rounding:
        # The predicted decrease would have been visible.
        return 0.0
    step = iterate.step()
    _, there = objective.loss_and_gradient(step)
    decrease = -0.5 * (dot(gradient, step) + dot(there, step))
    if norm(there) < norm(gradient) or abs(decrease - predicted) <= _AGREEING * predicted:
        return decrease
    return 0.0
