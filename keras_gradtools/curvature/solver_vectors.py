"""Vectors and matrices as the solvers take and return them."""

import keras
import numpy as np
from keras import ops

from keras_gradtools import validation


def real_numbers(given):
    """An array or a tensor as an array in single or double precision; None if it has no real numbers."""
    if ops.is_tensor(given) and validation.dtype_of(given) in ("float16", "bfloat16"):
        given = ops.cast(given, "float32")
    if isinstance(given, keras.KerasTensor):
        return None
    array = ops.convert_to_numpy(given)
    if array.dtype.kind not in "fiu":
        return None
    return array if array.dtype.kind == "f" and array.itemsize >= 4 else array.astype("float64")


def in_kind_of(given, array):
    """A solution as a tensor, if `given` was one, in its dtype where that has fractions; else as it is."""
    if not ops.is_tensor(given):
        return array
    dtype = validation.dtype_of(given)
    return ops.convert_to_tensor(array, dtype=dtype if keras.backend.is_float_dtype(dtype) else keras.config.floatx())


def lower_triangle(matrix):
    """A matrix without what is above its diagonal, in double precision, a copy."""
    return np.tril(matrix).astype("float64")
