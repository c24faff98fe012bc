"""The base class of the second-order optimizers."""

import math
from typing import Any, Self

import keras
from keras import ops

from keras_gradtools import validation
from keras_gradtools.annotations import Schedule
from keras_gradtools.second_order.newton_step import NewtonStepResult, newton_step
from keras_gradtools.second_order.step_solvers import require_enough_outputs


class SecondOrderOptimizer(keras.optimizers.Optimizer):
    """Base class: the options and the state of a second-order method, whose steps `kg.models.SecondOrder` takes.

    `damping` and the number of steps are variables, which are saved with the model. `learning_rate` multiplies every
    step.
    """

    def __init__(self, damping: float, max_attempts: int, learning_rate: Schedule, name: str) -> None:
        owner = type(self).__name__
        super().__init__(_require_learning_rate(owner, learning_rate), name=name)
        self.initial_damping: float = validation.require_number(owner, "damping", damping, least=0)
        self.max_attempts: int = validation.require_count(owner, "max_attempts", max_attempts)
        initial = keras.initializers.Constant(self.initial_damping)
        self._damping = self.add_variable((), initial, aggregation="only_first_replica", name="damping")
        self.has_trainer = False

    @property
    def damping(self) -> float:
        """The damping of the next step, a float. It can be set."""
        return float(ops.convert_to_numpy(self._damping))

    @damping.setter
    def damping(self, value: float) -> None:
        self._damping.assign(value)

    def operator_class(self) -> type:
        """The class of the curvature operator that this method uses."""
        raise NotImplementedError

    def solver(self, operator: Any, equations: Any) -> Any:
        """The solver for the step, as `newton_step` takes it.

        `operator` is the operator of one batch, `equations` the `NormalEquations` that all batches share.
        """
        raise NotImplementedError

    def take_step(self, operator: Any, equations: Any) -> NewtonStepResult:
        """Computes the step for one batch. The weights do not change."""
        return newton_step(
            operator,
            self.solver(operator, equations),
            self.damping,
            scale=float(ops.convert_to_numpy(self.learning_rate)),
            max_attempts=self.max_attempts,
        )

    def require_enough_outputs(self, operator: Any, examples: int) -> None:
        """Raises `ValueError` if the method cannot take a step on a batch of so few examples."""

    def at_end(self) -> tuple[Any, ...]:
        """Arrays for `assign_end`, after `take_step`."""
        return ()

    def assign_end(self, *arrays: Any) -> None:
        """Assigns what can be assigned by the program that moves the weights, before `end_step`."""

    def end_step(self, operator: Any, damping: float) -> None:
        """Stores what the next step needs, such as its damping. `operator` is the operator of the step that ended."""
        self.damping = damping
        self.iterations.assign_add(1)

    def variables_to_restore(self) -> list[Any]:
        """The variables that `assign_end` and `end_step` change, and that have to be as before if it fails."""
        return self.variables

    def build(self, variables: Any) -> None:
        if not self.has_trainer:
            raise ValueError(self._needs_trainer())
        super().build(variables)

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        raise ValueError(self._needs_trainer())

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        raise ValueError(self._needs_trainer())

    def _needs_trainer(self):
        owner = type(self).__name__
        return (
            f"{owner} is a second-order optimizer, which needs more than the gradients of a training step. "
            "Received: a model that trains on gradients alone. Wrap it: "
            f"`keras_gradtools.models.SecondOrder(model).compile(keras_gradtools.optimizers.{owner}(...), loss)`."
        )

    def get_config(self) -> dict[str, Any]:
        learning_rate = super().get_config()["learning_rate"]
        return {
            "damping": self.initial_damping,
            "max_attempts": self.max_attempts,
            "learning_rate": learning_rate,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Self:
        config = dict(config)
        if isinstance(config["learning_rate"], dict):
            config["learning_rate"] = keras.saving.deserialize_keras_object(
                config["learning_rate"], custom_objects=custom_objects
            )
        return cls(**config)


class MatrixOptimizer(SecondOrderOptimizer):
    """A method that forms and factorizes the matrix, which a batch with few outputs does not determine."""

    def __init__(
        self, damping: float, max_attempts: int, allow_underdetermined: bool, learning_rate: Schedule, name: str
    ) -> None:
        super().__init__(damping, max_attempts, learning_rate, name)
        owner = type(self).__name__
        self.allow_underdetermined: bool = validation.require_flag(
            owner, "allow_underdetermined", allow_underdetermined
        )

    def require_enough_outputs(self, operator: Any, examples: int) -> None:
        if not self.allow_underdetermined:
            require_enough_outputs(type(self).__name__, operator, examples)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "allow_underdetermined": self.allow_underdetermined}


def identities(variables):
    """A pair for each variable: its identity and its number of elements."""
    return tuple((id(v), math.prod(v.shape)) for v in variables)


def _require_learning_rate(owner, learning_rate):
    is_schedule = isinstance(learning_rate, (keras.optimizers.schedules.LearningRateSchedule, keras.Variable))
    if is_schedule or (callable(learning_rate) and not isinstance(learning_rate, keras.KerasTensor)):
        return learning_rate
    if not validation.is_number(learning_rate) or not 0 < learning_rate <= 1:
        expected = "a number above 0, and at most 1, or a schedule,"
        raise validation.refused(owner, expected, "learning_rate", learning_rate)
    return float(learning_rate)
