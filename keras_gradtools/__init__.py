"""Advanced gradient utilities for Keras 3, the same on TensorFlow, JAX and PyTorch."""

from keras_gradtools import (
    attacks,
    callbacks,
    curvature,
    diagnostics,
    layers,
    models,
    optimizers,
    plots,
    regularization,
    testing,
)
from keras_gradtools.custom_gradients import custom_gradient
from keras_gradtools.gradient_ops import (
    clip_gradient_norm,
    clip_gradient_value,
    reverse_gradient,
    scale_gradient,
    stop_gradient,
    straight_through,
)
from keras_gradtools.tape import GradientTape
from keras_gradtools.transforms import (
    batch_jacobian,
    flatten_hessian,
    functionalize,
    ggnvp,
    grad,
    hessian,
    hvp,
    jacobian,
    jit,
    jvp,
    kernel_hessian,
    linearize,
    per_example_grad,
    value_and_grad,
    vjp,
)

__version__ = "0.1.0"

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
    "flatten_hessian",
    "functionalize",
    "ggnvp",
    "grad",
    "hessian",
    "hvp",
    "jacobian",
    "jit",
    "jvp",
    "kernel_hessian",
    "layers",
    "linearize",
    "models",
    "optimizers",
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
