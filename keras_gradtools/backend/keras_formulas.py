"""Replacements for Keras operations whose derivatives are wrong at single points, such as 0.

Automatic differentiation takes the derivative of a formula, and the usual formula of these operations has a singularity
or a branch there. Each function here takes the original operation and returns one with the same values, computed by a
formula that has the right derivatives everywhere.

- `i0` at 0: the second derivative is 1/2. JAX gives 0 and TensorFlow 1. torch's fourth derivative is wrong.
- `sinc` at 0: TensorFlow's first derivative and torch's second one are NaN; JAX's first one is inaccurate nearby.
- `logaddexp(x, x)`: both derivatives are 1/2. TensorFlow gives 1 and 0.
- `ldexp(x, n)`: the derivative is 2^n. JAX and TensorFlow give 1 at x = 0, and torch gives 0 for n < 0.
- `nextafter(x, y)`: the x-derivative is 1. JAX and TensorFlow have none, and torch gives 0 where x = y.
"""

import functools
import math

import keras
from keras import ops


def i0(original):
    """`i0` by the sum of (x^2 / 4)^k / (k!)^2 where |x| < 0.5, and by `original` elsewhere."""
    coefficients = [1 / math.factorial(k) ** 2 for k in range(12)]
    return _even(original, coefficients, lambda x: x / 2)


def sinc(original):
    """`sinc` by the sum of (-1)^k (pi x)^2k / (2k + 1)! where |x| < 0.5, and by `original` elsewhere."""
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


def logaddexp(original):
    """`a + softplus(b - a)` if a > b, else `b + softplus(a - b)`. Both have the derivatives 1/2 and 1/2 at a = b."""
    return _smooth_maximum(original, 1.0)


def logaddexp2(original):
    """`logaddexp` for powers of 2."""
    return _smooth_maximum(original, math.log(2))


def _smooth_maximum(original, base):
    @functools.wraps(original)
    def call(x1, x2):
        value = original(x1, x2)
        x1, x2 = (ops.cast(ops.convert_to_tensor(x), value.dtype) for x in (x1, x2))
        is_finite = ops.logical_and(ops.isfinite(x1), ops.isfinite(x2))
        a, b = (ops.where(is_finite, x, ops.zeros_like(x)) for x in (x1, x2))
        smooth = ops.where(a > b, a + ops.softplus(base * (b - a)) / base, b + ops.softplus(base * (a - b)) / base)
        return ops.where(is_finite, smooth, value)

    return call


def ldexp(original):
    """`x1 * 2**x2` as a product, which has the right derivative."""

    @functools.wraps(original)
    def call(x1, x2):
        value = original(x1, x2)
        exponent = ops.cast(ops.convert_to_tensor(x2), value.dtype)
        # In two steps, because 2**x2 may overflow or underflow where the product does not.
        half = ops.floor(exponent / 2)
        two = 2 * ops.ones_like(exponent)
        return ops.cast(ops.convert_to_tensor(x1), value.dtype) * ops.power(two, half) * ops.power(two, exponent - half)

    return call


def nextafter(original):
    """x1 plus a constant, so that its derivative is 1."""

    @functools.wraps(original)
    def call(x1, x2):
        x1 = ops.convert_to_tensor(x1)
        value = original(ops.stop_gradient(x1), ops.stop_gradient(ops.convert_to_tensor(x2)))
        x1 = ops.cast(x1, value.dtype)
        return x1 + ops.stop_gradient(value - x1)

    return call
