"""Tangents and cotangents: what was given for them, as flat tensors that match their counterparts.

Of a nesting, they are of the leaves that have a derivative: real floating-point tensors and variables. In the places of
all others, None and counters and masks, what is given and returned has None.
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
    """As `differentiable`; `ValueError` if there is none, or anything but None, integers and booleans beside it.

    An array or a Python number is refused: what is computed from it, a tape does not see.
    """
    leaves = nesting.flatten(reference)
    found = [x for x in leaves if validation.has_derivative(x)]
    for x in leaves:
        is_constant = x is None or (ops.is_tensor(x) or validation.is_variable(x)) and validation.is_constant(x)
        if not (found and is_constant):
            validation.require_differentiable(x, role)
    return found


def replaced(reference, tensors):
    """The nesting of `reference` with other tensors for its leaves that have a derivative."""
    given = iter(tensors)
    return nesting.map_structure(lambda x: next(given) if validation.has_derivative(x) else x, reference)


def pack_as(reference, derivatives):
    """The nesting of `reference` with `derivatives` for its leaves that have one, and None for the others."""
    return places(reference).pack(derivatives)


def like(given, reference, role, of, default):
    """Flattens `given` as tensors that match those of `reference` with a derivative, `default` where it is None."""
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
    # JAX has arrays without content for this.
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
    return ops.zeros(x.shape, dtype=x.dtype) if validation.is_any_variable(x) else ops.zeros_like(x)


def ones(x):
    """Ones in the shape and dtype of a tensor or variable."""
    return ops.ones(x.shape, dtype=x.dtype) if validation.is_any_variable(x) else ops.ones_like(x)
