"""Functions of functions: what takes a Keras computation and gives another."""

from keras_gradtools.transforms.functional import jit

__all__ = ["jit"]
