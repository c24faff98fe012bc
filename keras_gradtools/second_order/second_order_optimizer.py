"""The base class of the second-order optimizers."""

import math

import keras
from keras import ops

from keras_gradtools import validation


class SecondOrderOptimizer(keras.optimizers.Optimizer):
    """The settings and the state of a second-order method. It needs more than gradients, so `SecondOrder` runs it.

    `damping` and the number of steps are variables, which are saved with the model. `learning_rate` multiplies every
    step.
    """

    # Whether the matrix is formed, so that a batch needs enough examples to determine it.
    forms_matrix = True

    def __init__(self, damping, max_attempts, learning_rate, name):
        owner = type(self).__name__
        if not validation.is_number(damping) or not 0 <= damping < math.inf:
            raise ValueError(
                f"{owner} expects a number of 0 or more as `damping`. Received: damping={validation.shown(damping)}."
            )
        self._check_count("max_attempts", max_attempts)
        is_schedule = isinstance(learning_rate, (keras.optimizers.schedules.LearningRateSchedule, keras.Variable))
        is_function = callable(learning_rate) and not isinstance(learning_rate, keras.KerasTensor)
        if not (validation.is_number(learning_rate) or is_schedule or is_function):
            raise ValueError(
                f"{owner} expects a number or a schedule as `learning_rate`. Received: learning_rate="
                f"{validation.shown(learning_rate)}."
            )
        if validation.is_number(learning_rate):
            learning_rate = float(learning_rate)
            if not 0 < learning_rate <= 1:
                raise ValueError(
                    f"{owner} expects a number above 0, and at most 1, as `learning_rate`. Received: "
                    f"learning_rate={validation.shown(learning_rate)}."
                )
        super().__init__(learning_rate, name=name)
        self.initial_damping, self.max_attempts = float(damping), int(max_attempts)
        initial = keras.initializers.Constant(self.initial_damping)
        self._damping = self.add_variable((), initial, aggregation="only_first_replica", name="damping")
        self.has_trainer = False

    def _check_count(self, name, value):
        validation.require_count(type(self).__name__, name, value)

    def _check_choice(self, name, value, choices):
        if not validation.is_one_of(value, choices):
            raise ValueError(
                f"{type(self).__name__} expects one of {list(choices)} as `{name}`. "
                f"Received: {name}={validation.shown(value)}."
            )

    @property
    def damping(self):
        """The damping of the next step, a float. It can be set."""
        return float(ops.convert_to_numpy(self._damping))

    @damping.setter
    def damping(self, value):
        self._damping.assign(value)

    def operator_class(self):
        """The class of the curvature operator that this method uses."""
        raise NotImplementedError

    def solver(self, operator, equations):
        """The solver for the step, as `curvature.newton_step` takes it.

        `operator` is the operator of one batch, `equations` the `NormalEquations` that all batches share.
        """
        raise NotImplementedError

    def end_step(self, operator, damping):
        """Stores what the next step needs, such as its damping. `operator` is the operator of the step that ended."""
        self.damping = damping
        self.iterations.assign_add(1)

    def build(self, variables):
        if not self.has_trainer:
            raise ValueError(self._needs_trainer())
        super().build(variables)

    def apply(self, grads, trainable_variables=None):
        raise ValueError(self._needs_trainer())

    def update_step(self, gradient, variable, learning_rate):
        raise ValueError(self._needs_trainer())

    def _needs_trainer(self):
        owner = type(self).__name__
        return (
            f"{owner} is a second-order optimizer, which needs more than the gradients of a training step. "
            "Received: a model that trains on gradients alone. Wrap it: "
            f"`keras_gradtools.models.SecondOrder(model).compile(keras_gradtools.optimizers.{owner}(...), loss)`."
        )

    def get_config(self):
        learning_rate = super().get_config()["learning_rate"]
        return {
            "damping": self.initial_damping,
            "max_attempts": self.max_attempts,
            "learning_rate": learning_rate,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        if isinstance(config["learning_rate"], dict):
            config["learning_rate"] = keras.saving.deserialize_keras_object(
                config["learning_rate"], custom_objects=custom_objects
            )
        return cls(**config)
