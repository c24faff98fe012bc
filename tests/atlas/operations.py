"""Inputs for every function of `keras.ops` that has a derivative, and the names of those that have none.

An entry is `name: [(fun, arrays), ...]`: a function of floating-point tensors, and the values of these. The awkward
inputs (zeros, ties, empty, one element) are made from the first of them in `cases.py`.
"""

import keras
from keras import ops

from tests.atlas.array_operations import BINARY, ELEMENTWISE, PRODUCTS, REDUCTIONS, SHAPES
from tests.atlas.cases import words
from tests.atlas.model_operations import FOURIER, IMAGES, LINEAR_ALGEBRA, NEURAL
from tests.atlas.new_operations import NEW

OPERATIONS = {
    **ELEMENTWISE,
    **BINARY,
    **REDUCTIONS,
    **SHAPES,
    **PRODUCTS,
    **LINEAR_ALGEBRA,
    **FOURIER,
    **NEURAL,
    **IMAGES,
    **NEW,
}

# What returns integers, booleans, strings or constants, creates tensors, or is a transform of its own.
WITHOUT_DERIVATIVE = set(
    words(
        "all allclose any arange argmax argmin argpartition argsort bartlett bitwise_and bitwise_invert "
        "bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor blackman convert_to_numpy "
        "count_nonzero ctc_decode digitize dtype empty empty_like equal eye gcd greater greater_equal hamming hanning "
        "histogram identity in_top_k is_tensor isclose isfinite isin isinf isnan isneginf isposinf isreal kaiser lcm "
        "left_shift less less_equal logical_and logical_not logical_or logical_xor matrix_rank multi_hot nanargmax "
        "nanargmin ndim nonzero not_equal one_hot ones right_shift searchsorted shape signbit size tri unravel_index "
        "zeros jvp grad view eig custom_gradient"
    )
)


def names():
    """The public functions of `keras.ops`, those of `ops.image` with their prefix."""
    found = {name for name in dir(ops) if not name.startswith("_") and callable(getattr(ops, name))}
    images = {f"image.{name}" for name in dir(keras.ops.image) if not name.startswith("_")}
    return found | images
