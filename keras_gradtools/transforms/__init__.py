"""Functions of functions: what takes a Keras computation and gives another."""

from keras_gradtools.transforms.first_order import grad, jvp, value_and_grad, vjp
from keras_gradtools.transforms.functional import jit

__all__ = ["grad", "jit", "jvp", "value_and_grad", "vjp"]
