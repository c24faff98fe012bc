"""Operations of Keras whose usual formulas have wrong derivatives at single points, by other formulas.

- `i0` at 0: JAX's second derivative is 0 and TensorFlow's 1, for 1/2; torch's fourth one is wrong.
- `sinc` at 0: TensorFlow's first derivative and torch's second one are NaN; JAX's first one is inaccurate nearby.
- `logaddexp(x, x)`: TensorFlow's derivatives are 1 and 0, for 1/2 and 1/2.
- `ldexp(x, n)`: JAX's and TensorFlow's derivative is 1 at x = 0, and torch's 0 for n < 0, for 2^n.
- `nextafter(x, y)`: JAX and TensorFlow have no derivative, and torch's is 0 where both are equal, for 1.
"""

import functools
import math

import keras
from keras import ops


def i0(original):
    """The sum of (x^2 / 4)^k / (k!)^2 where that is short."""
    coefficients = [1 / math.factorial(k) ** 2 for k in range(12)]
    return _even(original, coefficients, lambda x: x / 2)


def sinc(original):
    """The sum of (-1)^k (pi x)^2k / (2k + 1)! where that is short."""
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
    """The larger number and `softplus` of the other's distance, which is the same function on both sides."""
    return _smooth_maximum(original, 1.0)


def logaddexp2(original):
    """The same in powers of 2."""
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
    """The product with powers of 2 in floating point."""

    @functools.wraps(original)
    def call(x1, x2):
        value = original(x1, x2)
        exponent = ops.cast(ops.convert_to_tensor(x2), value.dtype)
        # In two steps, since a power may be too large or too small where the product is not.
        half = ops.floor(exponent / 2)
        two = 2 * ops.ones_like(exponent)
        return ops.cast(ops.convert_to_tensor(x1), value.dtype) * ops.power(two, half) * ops.power(two, exponent - half)

    return call


def nextafter(original):
    """The number itself and a constant."""

    @functools.wraps(original)
    def call(x1, x2):
        x1 = ops.convert_to_tensor(x1)
        value = original(ops.stop_gradient(x1), ops.stop_gradient(ops.convert_to_tensor(x2)))
        x1 = ops.cast(x1, value.dtype)
        return x1 + ops.stop_gradient(value - x1)

    return call
