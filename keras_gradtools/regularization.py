"""Penalties on gradients for custom training loops, and the choice of their weight.

`models` and `layers` contain the versions for `fit`.
"""

from keras_gradtools.attacks.penalty_weight_sweep import PenaltyWeightSweep, penalty_weight_sweep
from keras_gradtools.input_gradients.input_gradient_penalty import input_gradient_penalty

__all__ = ["PenaltyWeightSweep", "input_gradient_penalty", "penalty_weight_sweep"]


def __dir__() -> list[str]:
    return __all__
