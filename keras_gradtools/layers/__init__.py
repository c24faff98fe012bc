"""Gradient control and penalties as layers, which are saved and loaded with their models."""

from keras_gradtools.layers.clip_gradient_norm import ClipGradientNorm
from keras_gradtools.layers.clip_gradient_value import ClipGradientValue
from keras_gradtools.layers.custom_gradient import CustomGradient
from keras_gradtools.layers.input_gradient_penalty import InputGradientPenalty
from keras_gradtools.layers.reverse_gradient import ReverseGradient
from keras_gradtools.layers.scale_gradient import ScaleGradient
from keras_gradtools.layers.stop_gradient import StopGradient
from keras_gradtools.layers.straight_through import StraightThrough

__all__ = [
    "ClipGradientNorm",
    "ClipGradientValue",
    "CustomGradient",
    "InputGradientPenalty",
    "ReverseGradient",
    "ScaleGradient",
    "StopGradient",
    "StraightThrough",
]
