"""The weight of a penalty, and the training steps at which it is applied."""

import math
import typing

import keras
from keras import ops

from keras_gradtools import validation


class Applied(typing.NamedTuple):
    """A penalty in a training step: the term to add to the loss, and the values to log if `is_due`."""

    weighted: typing.Any
    penalty: typing.Any
    norm: typing.Any
    is_due: typing.Any


class Strength:
    """The weight of a penalty, a number or a schedule, which is applied at every `every`-th training step.

    `owner` is the name of the public class, for error messages.
    """

    def __init__(self, owner, weight, every=1):
        self.weight = _require_weight(owner, weight)
        self.every = validation.require_count(owner, "every", every)

    @property
    def depends_on_step(self):
        return self.every > 1 or self.is_schedule

    @property
    def is_schedule(self):
        return not validation.is_number(self.weight)

    @property
    def is_zero(self):
        """Whether the penalty is only measured, not trained."""
        return not self.is_schedule and self.weight == 0

    def at(self, steps):
        """The weight after this many training steps."""
        return self.weight(steps) if self.is_schedule else self.weight

    def apply(self, measured, steps, training, dtype):
        """The `Applied` penalty. `measured() -> (penalty, norm)`, in `dtype`, is computed only at steps that are due.

        In training, the weight is multiplied by `every`.
        """
        if not training or self.every == 1:
            penalty, norm = measured()
            return Applied(self._weighted(penalty, steps, 1), penalty, norm, ops.ones((), dtype))
        is_due = ops.equal(steps % self.every, 0)
        penalty, norm = ops.cond(is_due, measured, lambda: (ops.zeros((), dtype), ops.zeros((), dtype)))
        return Applied(self._weighted(penalty, steps, self.every), penalty, norm, ops.cast(is_due, dtype))

    def _weighted(self, penalty, steps, factor):
        if self.is_zero:
            return None
        return ops.cast(self.at(steps) * factor, penalty.dtype) * penalty

    def get_config(self):
        weight = keras.saving.serialize_keras_object(self.weight) if self.is_schedule else self.weight
        return {"weight": weight, "every": self.every}


def _require_weight(owner, weight):
    if isinstance(weight, keras.optimizers.schedules.LearningRateSchedule):
        return weight
    if not validation.is_number(weight) or not 0 <= weight < math.inf:
        expected = "a finite number of 0 or more, or a keras.optimizers.schedules.LearningRateSchedule,"
        raise validation.refused(
            owner, expected, "weight", weight, "Start with 0.1, and raise it until the clean accuracy drops."
        )
    return float(weight)
