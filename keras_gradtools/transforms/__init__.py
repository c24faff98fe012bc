"""Transforms: they take a function of a Keras computation and return another function, such as its gradient."""

from keras_gradtools.transforms.differential_operators import divergence, laplacian
from keras_gradtools.transforms.first_order import grad, jvp, linearize, value_and_grad, vjp
from keras_gradtools.transforms.functional import functionalize, jit
from keras_gradtools.transforms.jacobians import batch_jacobian, jacobian
from keras_gradtools.transforms.jet import jet
from keras_gradtools.transforms.kernel_hessian import kernel_hessian
from keras_gradtools.transforms.partial_derivatives import partial_derivatives
from keras_gradtools.transforms.per_example import per_example_grad
from keras_gradtools.transforms.second_order import flatten_hessian, ggnvp, hessian, hvp

__all__ = [
    "batch_jacobian",
    "divergence",
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
    "linearize",
    "partial_derivatives",
    "per_example_grad",
    "value_and_grad",
    "vjp",
]
