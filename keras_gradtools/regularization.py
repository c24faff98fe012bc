"""Penalties on gradients for custom training loops. `models` and `layers` contain the versions for `fit`."""

from keras_gradtools.input_gradients.input_gradient_penalty import input_gradient_penalty

__all__ = ["input_gradient_penalty"]


def __dir__() -> list[str]:
    return __all__
