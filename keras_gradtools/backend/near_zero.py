"""Functions of Keras that frameworks compute by formulas without derivatives at 0, by their power series around it.

| function | at 0                                                                                              |
| -------- | ------------------------------------------------------------------------------------------------- |
| `i0`     | JAX's second derivative is 0 and TensorFlow's 1, for 1/2; torch's fourth one is wrong              |
| `sinc`   | TensorFlow's first derivative and torch's second one are NaN, JAX's is inaccurate beside 0         |
"""

import functools
import math

import keras
from keras import ops


def i0(original):
    """Keras' `i0`, the sum of (x^2 / 4)^k / (k!)^2 where that is short."""
    coefficients = [1 / math.factorial(k) ** 2 for k in range(12)]
    return _even(original, coefficients, lambda x: x / 2)


def sinc(original):
    """Keras' `sinc`, the sum of (-1)^k (pi x)^2k / (2k + 1)! where that is short."""
    coefficients = [(-1) ** k / math.factorial(2 * k + 1) for k in range(12)]
    return _even(original, coefficients, lambda x: math.pi * x)


def _even(original, coefficients, scaled):
    @functools.wraps(original)
    def call(x):
        x = ops.convert_to_tensor(x)
        if not keras.backend.is_float_dtype(x.dtype):
            return original(x)
        is_small = ops.abs(x) < 0.5
        square = ops.square(scaled(ops.where(is_small, x, ops.zeros_like(x))))
        series = ops.zeros_like(x)
        for coefficient in reversed(coefficients):
            series = series * square + coefficient
        far = original(ops.where(is_small, ops.ones_like(x), x))
        return ops.where(is_small, ops.cast(series, far.dtype), far)

    return call
