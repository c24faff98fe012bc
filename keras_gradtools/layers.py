"""Gradient control, penalties and derivatives as layers, which are saved and loaded with their models.

To load a model that has them, import `keras_gradtools` first: that registers these classes with Keras.
"""

from keras_gradtools.gradient_control.clip_gradient_norm import ClipGradientNorm
from keras_gradtools.gradient_control.clip_gradient_value import ClipGradientValue
from keras_gradtools.gradient_control.custom_gradient import CustomGradient
from keras_gradtools.gradient_control.reverse_gradient import ReverseGradient
from keras_gradtools.gradient_control.scale_gradient import ScaleGradient
from keras_gradtools.gradient_control.stop_gradient import StopGradient
from keras_gradtools.gradient_control.straight_through import StraightThrough
from keras_gradtools.input_gradients.input_gradient_penalty_layer import InputGradientPenalty
from keras_gradtools.transforms.layers.batch_jacobian import BatchJacobian
from keras_gradtools.transforms.layers.divergence import Divergence
from keras_gradtools.transforms.layers.laplacian import Laplacian
from keras_gradtools.transforms.layers.partial_derivatives import PartialDerivatives

__all__ = [
    "BatchJacobian",
    "ClipGradientNorm",
    "ClipGradientValue",
    "CustomGradient",
    "Divergence",
    "InputGradientPenalty",
    "Laplacian",
    "PartialDerivatives",
    "ReverseGradient",
    "ScaleGradient",
    "StopGradient",
    "StraightThrough",
]


def __dir__() -> list[str]:
    return __all__
