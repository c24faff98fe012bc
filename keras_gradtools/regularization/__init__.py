"""Penalties on gradients, for training loops of one's own; `models` and `layers` have them for `fit`."""

from keras_gradtools.regularization.input_gradient_penalty import input_gradient_penalty

__all__ = ["input_gradient_penalty"]
