"""Checks of the matrix that an estimator or a solver receives, and its products with NumPy vectors."""

import keras
import numpy as np
from keras import ops

from keras_gradtools import validation
from keras_gradtools.curvature.operators.solver_vectors import real_numbers, solver_dtype
from keras_gradtools.display.progress import Progress

# Largest difference of a matrix from its transpose, relative to its largest element, that counts as rounding.
_TOLERANCE = 1e-3
# Number of rows that are compared with columns at once.
_ROWS = 1024


def as_real_matrix(a):
    """Returns `a`, or its NumPy array if it is a tensor. None unless it is real and has a product `a @ v`."""
    is_matrix = hasattr(a, "__matmul__") and not isinstance(a, keras.KerasTensor)
    if not is_matrix or (hasattr(a, "dtype") and validation.dtype_of(a).startswith("complex")):
        return None
    is_array = isinstance(a, np.ndarray) or ops.is_tensor(a) or validation.is_variable(a)
    return real_numbers(a) if is_array else a


def real_matrix(owner, a):
    """Returns `a`, or its array if it is a tensor. Raises `ValueError` unless it is real and has a product `a @ v`."""
    matrix = as_real_matrix(a)
    if matrix is None:
        raise ValueError(
            f"{owner} expects as `a` a real matrix, or an object with a product `a @ v`. Received: "
            f"{validation.describe(a)}."
        )
    return matrix


def square_matrix(owner, a):
    """Returns `a`, or its NumPy array if it is a tensor. Raises `ValueError` unless it is a real square matrix."""
    a = real_matrix(owner, a)
    shape = tuple(getattr(a, "shape", ()))
    if len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
        raise ValueError(
            f"{owner} expects as `a` a square matrix, or an object with `shape` and a product `a @ v`. Received: "
            f"{validation.describe(a)}."
        )
    return a


def symmetric_matrix(owner, a):
    """Returns `a`, or its NumPy array if it is a tensor. Raises `ValueError` unless it is a real symmetric matrix."""
    a = square_matrix(owner, a)
    require_symmetric(owner, a)
    return a


def require_symmetric(owner, a):
    """Raises `ValueError` if `a` is known not to be symmetric."""
    if not is_symmetric(a):
        raise ValueError(
            f"{owner} expects a symmetric matrix as `a`. Received: {validation.describe(a)}, which is not symmetric. "
            "Take its symmetric part, `0.5 * (a + a.T)`. A product of symmetric operators is symmetric if it reads the "
            "same backwards, such as `h @ g @ h`."
        )


def is_symmetric(a):
    """Whether a real square matrix is symmetric, up to rounding. True for objects whose elements are not known."""
    known = getattr(a, "is_symmetric", None)
    if known is not None:
        return bool(known)
    if isinstance(a, np.ndarray):
        blocks = [slice(start, start + _ROWS) for start in range(0, len(a), _ROWS)]
        # NaN and infinity pass this check. They are found later, when products are computed.
        with np.errstate(invalid="ignore"):
            difference = max(np.abs(a[rows] - a[:, rows].T).max() for rows in blocks)
        largest = max(np.abs(a[rows]).max() for rows in blocks)
    elif hasattr(a, "tocsr"):
        a = a.tocsr()
        difference, largest = abs(a - a.T).max(), abs(a).max()
    else:
        return True
    return not difference > _TOLERANCE * largest


def matvec_of(a):
    """A function that multiplies `a` by a NumPy vector and returns a NumPy vector, at the current weights."""
    a = a.linearized() if hasattr(a, "linearized") else a

    def matvec(vector):
        product = a @ vector
        product = product if isinstance(product, np.ndarray) else ops.convert_to_numpy(product)
        return np.asarray(product).reshape(-1)

    return matvec


def precision_of(a):
    """The NumPy dtype, single or double precision, in which a solver computes with `a`."""
    return solver_dtype(getattr(a, "dtype", None))


def progress_of(a, what, total, unit="product"):
    """The `Progress` of `total` products. Operators show a bar according to their `verbose`, other matrices never."""
    return a._progress(what, total, unit) if hasattr(a, "_progress") else Progress(total, what, 0, unit)
