"""Advanced gradient utilities for Keras 3, the same on TensorFlow, JAX and PyTorch."""

from keras_gradtools.tape import GradientTape
from keras_gradtools.transforms import jit

__version__ = "0.1.0"

__all__ = ["GradientTape", "jit"]
