"""Tangents and cotangents as flat lists of tensors that match the tensors they belong to.

Only the leaves of a nested structure that have a derivative (real floating-point tensors and variables) have a tangent
or cotangent. All other leaves, such as None, counters and masks, have None in its place.
"""

import keras
import numpy as np
from keras import ops

from keras_gradtools import nesting, validation


def places(reference):
    """The `Places` of the leaves that have a derivative."""
    return nesting.Places(nesting.outline(reference), tuple(map(validation.has_derivative, nesting.flatten(reference))))


def differentiable(reference):
    """The leaves of `reference` that have a derivative."""
    return [x for x in nesting.flatten(reference) if validation.has_derivative(x)]


def watchable(reference, role):
    """As `differentiable`, but raises `ValueError` for leaves that a tape cannot watch.

    There must be a leaf that has a derivative. All other leaves must be None or tensors of integers or booleans. Arrays
    and Python numbers are refused, because a tape does not see what is computed from them.
    """
    leaves = nesting.flatten(reference)
    found = [x for x in leaves if validation.has_derivative(x)]
    for x in leaves:
        is_constant = x is None or (ops.is_tensor(x) or validation.is_variable(x)) and validation.is_constant(x)
        if not (found and is_constant):
            validation.require_differentiable(x, role)
    return found


def replaced(reference, tensors):
    """The structure of `reference` with its leaves that have a derivative replaced by `tensors`."""
    given = iter(tensors)
    return nesting.map_structure(lambda x: next(given) if validation.has_derivative(x) else x, reference)


def pack_as(reference, derivatives):
    """The structure of `reference` with `derivatives` for its leaves that have one, and None for the others."""
    return places(reference).pack(derivatives)


def like(given, reference, role, of, default):
    """Flattens `given` into tensors, one for each leaf of `reference` that has a derivative.

    Where `given` has None, the tensor is `default(leaf)`.
    """
    flat_reference = nesting.flatten(reference)
    if given is None:
        return [default(r) for r in flat_reference if validation.has_derivative(r)]
    flat = []
    for g, r in zip(validation.matched(given, reference, role, of), flat_reference, strict=True):
        if not validation.has_derivative(r):
            _require_nothing(g, r, role, of)
            continue
        if g is None:
            flat.append(default(r))
            continue
        g = _tensor(g, r, role)
        validation.require_shape(g, r.shape, f"Each entry of {role}", f"its counterpart in {of}")
        flat.append(g)
    return flat


def _require_nothing(given, counterpart, role, of):
    # `float0`, the dtype that JAX uses for tangents of integers, has an itemsize of 0.
    if given is not None and getattr(getattr(given, "dtype", None), "itemsize", None) != 0:
        raise ValueError(
            f"Each entry of {role} must be None where its counterpart in {of} has no derivative. Received: "
            f"{validation.describe(given)} for {validation.describe(counterpart)}."
        )


def _tensor(given, like, role):
    if ops.is_tensor(given) and given.dtype == like.dtype:
        return given
    return real_tensor(given, like.dtype, f"Each entry of {role}")


def real_tensor(given, dtype, role):
    """Returns `given` as a tensor of `dtype`, and raises `ValueError` unless it holds real numbers.

    Integers and booleans count as numbers. A loss of precision in the conversion is accepted, as in the framework.
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
    """The name of the dtype of `given`, or of the array NumPy makes of it. None if it cannot be an array."""
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
    # Reading a variable would make an enclosing tape watch it.
    return ops.zeros(x.shape, dtype=x.dtype) if validation.is_any_variable(x) else ops.zeros_like(x)


def ones(x):
    """Ones in the shape and dtype of a tensor or variable."""
    return ops.ones(x.shape, dtype=x.dtype) if validation.is_any_variable(x) else ops.ones_like(x)
