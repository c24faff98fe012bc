"""The base class of the quasi-Newton methods, which learn the curvature from gradients."""

import math
import warnings
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_gradtools import validation
from keras_gradtools.annotations import Schedule
from keras_gradtools.curvature.operators.hessian import Hessian
from keras_gradtools.curvature.operators.solver_vectors import solver_dtype
from keras_gradtools.second_order.line_search import ROUNDING, Point, line_search
from keras_gradtools.second_order.newton_step import NewtonStepResult, StepReason
from keras_gradtools.second_order.second_order_optimizer import SecondOrderOptimizer, identities

# A pair is used if its curvature is above this share of what its lengths allow. Otherwise it is rounding noise.
_LEAST_CURVATURE = 1e-10


class QuasiNewton(SecondOrderOptimizer):
    """Base class: steps along `-H g`, with a strong Wolfe line search, where H approximates the inverse Hessian.

    A subclass has `approximation()`, the current H, and `store(approximation)`. In its `build`, it adds the variables
    of H, which make H the identity if they are zero. An approximation has `is_initial`, whether it is the identity,
    `initial()`, and `updated(pair)`. Its `descent(gradient)` returns the direction, its slope, and the approximation
    itself, which may have computed what `updated` needs. If its `direction()` is not None, a program of trials computes
    this `Direction`, and `descended` takes what else it returns.
    """

    def __init__(self, max_evaluations: int, learning_rate: Schedule, name: str) -> None:
        super().__init__(0.0, 1, learning_rate, name)
        owner = type(self).__name__
        self.max_evaluations: int = validation.require_count(owner, "max_evaluations", max_evaluations)
        self.now = _Now()
        # How many of the variables do not belong to the approximation, and the weights that it belongs to.
        self._others, self._built_for = 0, ()

    def build(self, variables: Any) -> None:
        super().build(variables)
        self._others, self._built_for = len(self.variables), identities(variables)

    def operator_class(self) -> type:
        return Hessian

    def approximation(self) -> Any:
        """The approximation of the inverse Hessian."""
        raise NotImplementedError

    def store(self, approximation: Any) -> None:
        """Stores the approximation for the next step, in variables."""
        raise NotImplementedError

    def take_step(self, operator: Any, equations: Any) -> NewtonStepResult:
        self._require_same_weights(operator)
        trials, inverse = operator.trials(), self.approximation()
        start = self._start(operator, trials, inverse)
        loss, gradient, length = start.loss, start.gradient, start.gradient_norm

        def ended(reason, message, evaluations=0):
            return NewtonStepResult(reason, message, None, loss, 0.0, math.nan, length, 0.0, 0.0, 0, evaluations)

        if not math.isfinite(loss) or not math.isfinite(length):
            what = "gradient" if math.isfinite(loss) else "loss"
            return ended(StepReason.NOT_FINITE, f"the {what} is not finite")
        if not length:
            return ended(StepReason.VANISHED, "the gradient is zero")
        first, descent = float(ops.convert_to_numpy(self.learning_rate)), None
        if not inverse.is_initial:
            descent = _Descent.of(inverse, trials, start, first)
        if descent is None or not descent.slope < 0.0:
            # There is no pair yet, or rounding has made the approximation indefinite.
            first *= min(1.0, 1.0 / float(np.abs(ops.convert_to_numpy(gradient)).sum(dtype="float64")))
            descent = _Descent.of(inverse.initial(), trials, start, first)
        inverse, slope, trial_at = descent

        def evaluate(t):
            trial = trial_at(t)
            return Point(t, trial.loss, trial.slope / t, trial)

        epsilon = float(np.finfo(np.dtype(operator.dtype) if operator.dtype != "bfloat16" else "float32").eps)
        found = line_search(evaluate, Point(0.0, loss, slope), first, self.max_evaluations, epsilon)
        if found.point is None:
            self.now.pending = inverse.initial()
            if abs(first * slope) <= epsilon * abs(loss):
                return ended(StepReason.VANISHED, "the possible decrease is below rounding", found.evaluations)
            message = f"none of {found.evaluations} step lengths lowered the loss sufficiently"
            return ended(StepReason.REJECTED, message, found.evaluations)
        t, trial = found.point.step, found.point.trial
        # The vectors of the step are not needed at the start of the next one.
        self.now.reached = trial._replace(step=None, change=None)
        pair = Pair.of(trial, t)
        self.now.pending = inverse.updated(pair) if pair.is_usable else inverse
        # The quadratic model has the curvature -slope along the direction.
        predicted = -slope * (t - 0.5 * t**2)
        decrease = loss - trial.loss
        if abs(decrease) <= ROUNDING * epsilon * abs(loss):
            # The difference of the losses is rounding, which the slopes at both ends are not.
            decrease = -0.5 * t * (slope + found.point.slope)
        ratio = decrease / predicted if predicted > 0.0 else 1.0
        return NewtonStepResult(
            StepReason.ACCEPTED, "the loss went down", ops.convert_to_numpy(trial.step), loss, decrease, ratio, length,
            0.0, trial.step_norm, 0, found.evaluations,
        )  # fmt: skip

    def _require_same_weights(self, operator):
        weights = identities(operator.variables)
        if weights == self._built_for:
            return
        built_for, received = (sum(size for _, size in known) for known in (self._built_for, weights))
        raise ValueError(
            f"{type(self).__name__} was built for {built_for} weights, whose curvature it has stored. Received: "
            f"{received} trainable weights{', not the same ones' if received == built_for else ''}. After layers were "
            "frozen or unfrozen, compile the trainer with a new optimizer."
        )

    def _start(self, operator, trials, inverse):
        """The `Trial` at the weights. That at the end of the former step if nothing else has changed since."""
        former, known = self.now.known
        self.now = now = _Now()
        state = operator.loss_state()
        if state is not None:
            now.state = state.kept(former)
            if state.is_same(former):
                return known
        # By the program of the line search, so that a resumed run computes the same bits.
        return trials.start(_direction(trials, inverse))

    def assign_end(self, *arrays: Any) -> None:
        self.iterations.assign_add(1)

    def end_step(self, operator: Any, damping: float) -> None:
        # Without the damping, which is always zero.
        now = self.now
        if now.pending is not None:
            self.store(now.pending)
        if now.reached is not None and now.state is not None:
            now.known = now.state.with_weights(operator.variables), now.reached
        now.pending = now.reached = now.state = None

    def load_own_variables(self, store: Any) -> None:
        """Loads as Keras does. Of an approximation for other weights, it loads nothing and warns."""
        own, saved = self.variables, [store[str(i)] for i in range(len(store.keys()))]
        if len(saved) <= self._others < len(own):
            # Saved before the first step.
            super().load_own_variables(store)
            return
        if [tuple(v.shape) for v in own] == [tuple(a.shape) for a in saved]:
            for variable, value in zip(own, saved, strict=True):
                variable.assign(value)
            return
        warnings.warn(
            f"{type(self).__name__} starts without the curvature of earlier steps, which was saved for other weights "
            "or options. Layers that were frozen before saving have no trainable weights after loading.",
            stacklevel=2,
        )
        for i, variable in enumerate(own):
            variable.assign(saved[i] if i < self._others else ops.zeros(variable.shape, dtype=variable.dtype))

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["damping"], config["max_attempts"]
        return {**config, "max_evaluations": self.max_evaluations}


class _Now:
    """What a step holds until its end, and then for the next one. Keras would track it as attributes of an optimizer.

    Attributes:
        pending: The approximation that is to be stored.
        reached: The `Trial` at the end of the step.
        state: The `LossState` at its start.
        known: After the step, the `LossState` at its end, and the `Trial` there.
    """

    pending: Any = None
    reached: Any = None
    state: Any = None
    known: tuple[Any, Any] = (None, None)


def _direction(trials, inverse):
    """The `Direction` of the approximation, if one program can compute it with the trial along it. Otherwise None."""
    return inverse.direction() if trials.can_follow else None


class _Descent(NamedTuple):
    """An approximation with what its direction has computed, the slope, and the `Trial` as a function of the step."""

    inverse: Any
    slope: float
    trial_at: Any

    @classmethod
    def of(cls, inverse, trials, start, first):
        """The direction of the approximation. `first` is the step that is tried first."""
        gradient, steepest = start.gradient, -(start.gradient_norm**2)
        together = _direction(trials, inverse)
        if together is not None:
            at = trials.along(together)
            trial, more = at(first, gradient)
            slope = steepest if inverse.is_initial else trial.former_slope / first
            return cls(inverse.descended(more), slope, lambda t: trial if t == first else at(t, gradient)[0])
        if inverse.is_initial:
            direction, slope = -gradient, steepest
        else:
            direction, slope, inverse = inverse.descent(gradient)

        def trial_at(t):
            return trials.at(direction if t == 1.0 else direction * trials.dtype.type(t), gradient)

        return cls(inverse, slope, trial_at)


class Pair(NamedTuple):
    """A step s and the change y of the gradient along it.

    Attributes:
        step, change: s and y, tensors or NumPy arrays.
        former_curvature: s'Bs, where B is the inverse of the approximation that the step was computed with.
        curvature: s'y.
        length: The product of the norms of s and y.
    """

    step: Any
    change: Any
    former_curvature: float
    curvature: float
    length: float

    @classmethod
    def of(cls, trial, t):
        """The pair of a `Trial` at t times the direction."""
        length = trial.step_norm * trial.change_norm
        return cls(trial.step, trial.change, -t * trial.former_slope, trial.curvature, length)

    @property
    def is_usable(self):
        """Whether the curvature along the step is positive and more than rounding noise."""
        return self.curvature > _LEAST_CURVATURE * self.length


def state_dtype(variables):
    """The dtype of what a method stores about these weights, a name."""
    is_double = any(keras.backend.standardize_dtype(v.dtype) == "float64" for v in variables)
    return solver_dtype("float64" if is_double else "float32").name
