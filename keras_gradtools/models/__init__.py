"""Keras models that wrap another model and change how it is trained."""

from keras_gradtools.models.adversarial_training import AdversarialTraining
from keras_gradtools.models.input_gradient_regularized import InputGradientRegularized
from keras_gradtools.models.second_order import SecondOrder

__all__ = ["AdversarialTraining", "InputGradientRegularized", "SecondOrder"]
