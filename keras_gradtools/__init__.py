"""Advanced gradient utilities for Keras 3 on TensorFlow, JAX and PyTorch."""

import keras_gradtools.start  # noqa: F401 - before Keras is imported
from keras_gradtools import (
    attacks,
    callbacks,
    curvature,
    diagnostics,
    layers,
    losses,
    models,
    optimizers,
    plots,
    regularization,
    testing,
)
from keras_gradtools.double_precision import double_precision
from keras_gradtools.gradient_control.clip_gradient_norm import clip_gradient_norm
from keras_gradtools.gradient_control.clip_gradient_value import clip_gradient_value
from keras_gradtools.gradient_control.custom_gradient import custom_gradient
from keras_gradtools.gradient_control.reverse_gradient import reverse_gradient
from keras_gradtools.gradient_control.scale_gradient import scale_gradient
from keras_gradtools.gradient_control.stop_gradient import stop_gradient
from keras_gradtools.gradient_control.straight_through import straight_through
from keras_gradtools.tape.gradient_tape import GradientTape
from keras_gradtools.transforms import (
    batch_jacobian,
    divergence,
    flatten_hessian,
    functionalize,
    ggnvp,
    grad,
    hessian,
    hvp,
    jacobian,
    jet,
    jit,
    jvp,
    kernel_hessian,
    laplacian,
    linearize,
    partial_derivatives,
    per_example_grad,
    value_and_grad,
    vjp,
)

__version__ = "0.3.0"

__all__ = [
    "GradientTape",
    "attacks",
    "batch_jacobian",
    "callbacks",
    "clip_gradient_norm",
    "clip_gradient_value",
    "curvature",
    "custom_gradient",
    "diagnostics",
    "divergence",
    "double_precision",
    "flatten_hessian",
    "functionalize",
    "ggnvp",
    "grad",
    "hessian",
    "hvp",
    "jacobian",
    "jet",
    "jit",
    "jvp",
    "kernel_hessian",
    "laplacian",
    "layers",
    "linearize",
    "losses",
    "models",
    "optimizers",
    "partial_derivatives",
    "per_example_grad",
    "plots",
    "regularization",
    "reverse_gradient",
    "scale_gradient",
    "stop_gradient",
    "straight_through",
    "testing",
    "value_and_grad",
    "vjp",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
