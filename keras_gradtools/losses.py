"""Losses for `kg.models`, `kg.curvature` and callbacks, in place of a loss of Keras."""

from keras_gradtools.training.squared_residuals import SquaredResiduals

__all__ = ["SquaredResiduals"]


def __dir__() -> list[str]:
    return __all__
