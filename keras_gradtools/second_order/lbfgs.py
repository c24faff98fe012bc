"""The limited-memory BFGS method."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_gradtools import validation
from keras_gradtools.annotations import Schedule
from keras_gradtools.curvature.estimators.krylov_basis import dot, norm
from keras_gradtools.curvature.operators.hessian import Hessian
from keras_gradtools.curvature.operators.solver_vectors import solver_dtype
from keras_gradtools.second_order.line_search import ROUNDING, Point, line_search
from keras_gradtools.second_order.newton_step import NewtonStepResult, StepReason
from keras_gradtools.second_order.second_order_optimizer import SecondOrderOptimizer

# A pair is kept if its curvature is above this share of what its lengths allow. Otherwise it is rounding noise.
_LEAST_CURVATURE = 1e-10


@keras.saving.register_keras_serializable(package="keras_gradtools")
class LBFGS(SecondOrderOptimizer):
    r"""The limited-memory BFGS method, $\theta \leftarrow \theta - t \, H_k \, g$, with a strong Wolfe line search.

    $g$ is the gradient of the batch. $H_k$ approximates the inverse of the Hessian. It is what BFGS updates with the
    last `memory` steps $s_i$ and changes of the gradient $y_i$ make of $\gamma I$, where
    $\gamma = s^\top y / y^\top y$ for the last pair. No matrix is formed, and only gradients are computed, so it works
    for models of any size whose loss is smooth. Use it with `kg.models.SecondOrder`.

    Train on all of the data in each batch, or on large batches. Each $y_i$ is the change of the gradient of one batch,
    at the weights before and after its step, so noise of the batches does not enter it. The curvature of one batch is
    then used in the step of the next one, which has to be similar.

    Args:
        memory: Number of pairs that are stored.
        max_evaluations: Maximum number of evaluations of the loss and its gradient in the line search of one step. If
            no step with a sufficient decrease is found, the weights do not change and the pairs are forgotten.
        learning_rate: Factor of the first step that the line search tries, above 0 and at most 1, or a
            `LearningRateSchedule`.
        name: Name of the optimizer.

    Raises:
        ValueError: If an option is invalid. In `fit`, if the model is not a `SecondOrder`.

    Cost:
        For each step, the gradient before it, and one or two evaluations of the loss and its gradient in the line
        search. `4 * memory * n` multiplications for n weights, and memory for `2 * memory` vectors.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> trainer = kg.models.SecondOrder(model)
    >>> trainer.compile(kg.optimizers.LBFGS(), "mse")
    >>> x = np.random.default_rng(0).normal(size=(100, 2)).astype("float32")
    >>> history = trainer.fit(x, x @ [[2.0], [-1.0]], batch_size=100, epochs=15, verbose=0)
    >>> model.get_weights()[0].round(3).ravel().tolist()
    [2.0, -1.0]

    Source: Nocedal & Wright, "Numerical Optimization" (2006), algorithms 7.4 and 7.5; Berahas, Nocedal & Takáč, "A
    multi-batch L-BFGS method for machine learning" (2016) for gradients of the same batch.
    """

    def __init__(
        self, memory: int = 10, max_evaluations: int = 20, learning_rate: Schedule = 1.0, name: str = "lbfgs"
    ) -> None:
        super().__init__(0.0, 1, learning_rate, name)
        owner = type(self).__name__
        self.memory = validation.require_count(owner, "memory", memory)
        self.max_evaluations = validation.require_count(owner, "max_evaluations", max_evaluations)
        self._pending: Any = None

    def build(self, variables: Any) -> None:
        if self.built:
            return
        super().build(variables)
        size = sum(math.prod(v.shape) for v in variables)
        dtype = solver_dtype("float64" if any(v.dtype == "float64" for v in variables) else "float32").name
        options = {"dtype": dtype, "aggregation": "only_first_replica"}
        self._steps = self.add_variable((self.memory, size), name="steps", **options)
        self._changes = self.add_variable((self.memory, size), name="gradient_changes", **options)

    def operator_class(self) -> type:
        return Hessian

    def take_step(self, operator: Any, equations: Any) -> NewtonStepResult:
        operator.check("gradient")
        loss, gradient = operator.loss_and_gradient()
        length = norm(gradient)

        def ended(reason, message, evaluations=0):
            return NewtonStepResult(reason, message, None, loss, 0.0, math.nan, length, 0.0, 0.0, 0, evaluations)

        if not math.isfinite(loss) or not math.isfinite(length):
            what = "gradient" if math.isfinite(loss) else "loss"
            return ended(StepReason.NOT_FINITE, f"the {what} is not finite")
        if not length:
            return ended(StepReason.VANISHED, "the gradient is zero")
        steps, changes = self._pairs(operator.shape[0])
        direction = -_inverse_times(gradient, steps, changes)
        slope = dot(gradient, direction)
        first = self._rate() * (1.0 if len(steps) else min(1.0, 1.0 / float(np.abs(gradient).sum(dtype="float64"))))
        if not slope < 0.0:
            steps, changes, direction, slope = steps[:0], changes[:0], -gradient, -(length**2)

        def evaluate(t):
            there, gradient_there = operator.loss_and_gradient((t * direction).astype(operator.dtype))
            return Point(t, there, dot(gradient_there, direction), gradient_there)

        epsilon = float(np.finfo(np.dtype(operator.dtype) if operator.dtype != "bfloat16" else "float32").eps)
        found = line_search(evaluate, Point(0.0, loss, slope), first, self.max_evaluations, epsilon)
        if found.point is None:
            self._pending = steps[:0], changes[:0]
            if abs(first * slope) <= epsilon * abs(loss):
                return ended(StepReason.VANISHED, "the possible decrease is below rounding", found.evaluations)
            message = f"none of {found.evaluations} step lengths lowered the loss sufficiently"
            return ended(StepReason.REJECTED, message, found.evaluations)
        step = (found.point.step * direction).astype(operator.dtype)
        change = found.point.gradient - gradient
        if dot(step, change) > _LEAST_CURVATURE * norm(step) * norm(change):
            steps = np.concatenate([step[None].astype(steps.dtype), steps])[: self.memory]
            changes = np.concatenate([change[None].astype(changes.dtype), changes])[: self.memory]
        self._pending = steps, changes
        # The quadratic model has the curvature -slope along the direction.
        predicted = -slope * (found.point.step - 0.5 * found.point.step**2)
        decrease = loss - found.point.loss
        if abs(decrease) <= ROUNDING * epsilon * abs(loss):
            # The difference of the losses is rounding, which the slopes at both ends are not.
            decrease = -0.5 * found.point.step * (slope + found.point.slope)
        ratio = decrease / predicted if predicted > 0.0 else 1.0
        return NewtonStepResult(
            StepReason.ACCEPTED, "the loss went down", step, loss, decrease, ratio, length, 0.0, norm(step), 0,
            found.evaluations,
        )  # fmt: skip

    def end_step(self, operator: Any, damping: float) -> None:
        super().end_step(operator, damping)
        # If variables were frozen after `build`, pairs have another length than what is stored.
        if self._pending is not None and self._steps.shape[1] == operator.shape[0]:
            for variable, rows in zip((self._steps, self._changes), self._pending, strict=True):
                padded = np.zeros(tuple(variable.shape), rows.dtype)
                padded[: len(rows)] = rows
                variable.assign(padded)
        self._pending = None

    def _rate(self):
        return float(ops.convert_to_numpy(self.learning_rate))

    def _pairs(self, size):
        """The pairs, the newest first. None of them if the variables have changed since `build`."""
        steps, changes = (ops.convert_to_numpy(ops.convert_to_tensor(v)) for v in (self._steps, self._changes))
        if steps.shape[1] != size:
            return np.zeros((0, size), steps.dtype), np.zeros((0, size), steps.dtype)
        # Rows that are not in use yet are zero.
        count = int(np.any(steps != 0.0, axis=1).sum())
        return steps[:count], changes[:count]

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["damping"], config["max_attempts"]
        return {**config, "memory": self.memory, "max_evaluations": self.max_evaluations}


def _inverse_times(vector, steps, changes):
    """The two-loop recursion: the approximate inverse Hessian times a vector, in double precision."""
    found = np.asarray(vector, "float64").copy()
    curvatures = [dot(s, y) for s, y in zip(steps, changes, strict=True)]
    shares = []
    for s, y, curvature in zip(steps, changes, curvatures, strict=True):
        shares.append(dot(s, found) / curvature)
        found -= shares[-1] * y
    if len(steps):
        found *= curvatures[0] / dot(changes[0], changes[0])
    for s, y, curvature, share in zip(steps[::-1], changes[::-1], curvatures[::-1], shares[::-1], strict=True):
        found += (share - dot(y, found) / curvature) * s
    return found
