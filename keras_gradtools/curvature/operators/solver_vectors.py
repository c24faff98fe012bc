"""Conversions of the vectors and matrices that the solvers take and return."""

import keras
import numpy as np
from keras import ops

from keras_gradtools import validation


def real_numbers(given):
    """Converts an array or a tensor to an array in single or double precision. None if its numbers are not real."""
    if ops.is_tensor(given) and validation.dtype_of(given) in ("float16", "bfloat16"):
        given = ops.cast(given, "float32")
    if isinstance(given, keras.KerasTensor):
        return None
    array = ops.convert_to_numpy(given)
    if array.dtype.kind not in "fiu":
        return None
    return array if array.dtype.kind == "f" and array.itemsize >= 4 else array.astype("float64")


def in_kind_of(given, array):
    """Converts an array to a tensor if `given` is one, of the dtype of `given`, or `floatx` if that is not a float."""
    if not ops.is_tensor(given):
        return array
    dtype = validation.dtype_of(given)
    return ops.convert_to_tensor(array, dtype=dtype if keras.backend.is_float_dtype(dtype) else keras.config.floatx())


def lower_triangle(matrix):
    """A copy of the lower triangle of a matrix, with zeros above it, in double precision."""
    return np.tril(matrix).astype("float64")


def solver_dtype(dtype):
    """The precision in which a solver computes with a matrix of this dtype, a name, a NumPy dtype or None."""
    # NumPy has no bfloat16, and half precision is too imprecise for solvers.
    is_single = getattr(dtype, "name", dtype) in ("float32", "float16", "bfloat16")
    return np.dtype("float32" if is_single else "float64")
