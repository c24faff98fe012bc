"""Tangents and cotangents: what was given for them, as flat tensors that match their counterparts."""

import keras
import numpy as np
from keras import ops

from keras_gradtools import nesting, validation


def like(given, reference, role, of, default):
    """Flattens `given` as tensors that match those of `reference` one by one, `default` where it is None."""
    flat_reference = nesting.flatten(reference)
    if given is None:
        return [default(r) for r in flat_reference]
    validation.require_same_structure(given, reference, role, of)
    flat = []
    for g, r in zip(nesting.flatten(given), flat_reference, strict=True):
        if g is None:
            flat.append(default(r))
            continue
        g = _tensor(g, r, role)
        validation.require_shape(g, r.shape, f"Each entry of {role}", f"its counterpart in {of}")
        flat.append(g)
    return flat


def _tensor(given, like, role):
    if ops.is_tensor(given) and given.dtype == like.dtype:
        return given
    return real_tensor(given, like.dtype, f"Each entry of {role}")


def real_tensor(given, dtype, role):
    """Returns `given` as a tensor of `dtype`, and raises `ValueError` unless it is of real numbers.

    Integers and booleans are numbers; a cast to fewer digits is the framework's own. What is complex, a string or
    an object would lose more than digits.
    """
    kind = _kind(given)
    if kind is not None and kind.startswith("complex"):
        raise ValueError(
            f"{role} must be real. Received: {validation.describe(given)}. Complex values are not supported: take the "
            "real and the imaginary part."
        )
    if kind is not None and kind.startswith(("float", "bfloat", "int", "uint", "bool")):
        try:
            return ops.convert_to_tensor(given, dtype=dtype)
        except (ValueError, TypeError, RuntimeError):
            pass
    raise ValueError(f"{role} must be a tensor, an array or a number. Received: {validation.describe(given)}.")


def _kind(given):
    """The name of a dtype that stands for what `given` holds; None where that is no array of numbers."""
    if isinstance(given, keras.KerasTensor):
        return None
    if hasattr(given, "dtype") and hasattr(given, "shape"):
        return validation.dtype_of(given)
    try:
        return np.asarray(given).dtype.name
    except (ValueError, TypeError, RuntimeError):
        return None


def zeros(x):
    """Zeros in the shape and dtype of a tensor or variable."""
    # A variable is not read for this: a tape around would watch it.
    return ops.zeros(x.shape, dtype=x.dtype) if validation.is_variable(x) else ops.zeros_like(x)


def ones(x):
    """Ones in the shape and dtype of a tensor or variable."""
    return ops.ones(x.shape, dtype=x.dtype) if validation.is_variable(x) else ops.ones_like(x)
