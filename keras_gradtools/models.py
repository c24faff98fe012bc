"""Keras models that wrap another model and change how it is trained.

To load a saved wrapper, import `keras_gradtools` first: that registers these classes with Keras.
"""

from keras_gradtools.attacks.adversarial_training import AdversarialTraining
from keras_gradtools.input_gradients.input_gradient_regularized import InputGradientRegularized
from keras_gradtools.second_order.second_order_model import SecondOrder
from keras_gradtools.training.compiled_training import CompiledTraining

__all__ = ["AdversarialTraining", "CompiledTraining", "InputGradientRegularized", "SecondOrder"]


def __dir__() -> list[str]:
    return __all__
