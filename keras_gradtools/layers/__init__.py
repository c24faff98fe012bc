"""Gradient control, penalties and derivatives as layers, which are saved and loaded with their models."""

from keras_gradtools.layers.batch_jacobian import BatchJacobian
from keras_gradtools.layers.clip_gradient_norm import ClipGradientNorm
from keras_gradtools.layers.clip_gradient_value import ClipGradientValue
from keras_gradtools.layers.custom_gradient import CustomGradient
from keras_gradtools.layers.divergence import Divergence
from keras_gradtools.layers.input_gradient_penalty import InputGradientPenalty
from keras_gradtools.layers.laplacian import Laplacian
from keras_gradtools.layers.reverse_gradient import ReverseGradient
from keras_gradtools.layers.scale_gradient import ScaleGradient
from keras_gradtools.layers.stop_gradient import StopGradient
from keras_gradtools.layers.straight_through import StraightThrough

__all__ = [
    "BatchJacobian",
    "ClipGradientNorm",
    "ClipGradientValue",
    "CustomGradient",
    "Divergence",
    "InputGradientPenalty",
    "Laplacian",
    "ReverseGradient",
    "ScaleGradient",
    "StopGradient",
    "StraightThrough",
]
