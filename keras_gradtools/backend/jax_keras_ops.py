"""Keras operations that, on JAX, may hand their argument back without JAX having seen an operation.

`reshape` to the same shape is one. A tape follows values by identity and could not tell the two apart: what
was computed outside its recording would be followed, and a derivative by the result be one by the argument.
"""

import functools

from keras.src.backend.jax import core as keras_core
from keras.src.backend.jax import numpy as keras_numpy

from keras_gradtools.backend import jax_trace

_SHAPING = (
    "broadcast_to",
    "concatenate",
    "expand_dims",
    "moveaxis",
    "ravel",
    "reshape",
    "squeeze",
    "swapaxes",
    "transpose",
)


def install():
    for name in _SHAPING:
        setattr(keras_numpy, name, _with_distinct_result(getattr(keras_numpy, name), jax_trace.recorded_alias))
    keras_core.stop_gradient = _with_distinct_result(keras_core.stop_gradient, jax_trace.alias)


def _with_distinct_result(fun, alias):
    @functools.wraps(fun)
    def call(x, *args, **kwargs):
        y = fun(x, *args, **kwargs)
        handed_back = y is x or isinstance(x, (list, tuple)) and any(y is part for part in x)
        return alias(y) if handed_back and jax_trace.needs_alias(y) else y

    return call
