"""Tangents and cotangents: what was given for them, as flat tensors that match their counterparts."""

import keras
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
    try:
        if isinstance(given, keras.KerasTensor):
            raise TypeError("a symbolic tensor has no values")
        return ops.convert_to_tensor(given, dtype=like.dtype)
    except (ValueError, TypeError, RuntimeError):
        raise ValueError(
            f"Each entry of {role} must be a tensor, an array or a number. Received: {validation.describe(given)}."
        ) from None


def zeros(x):
    """Zeros in the shape and dtype of a tensor or variable."""
    # A variable is not read for this: a tape around would watch it.
    return ops.zeros(x.shape, dtype=x.dtype) if validation.is_variable(x) else ops.zeros_like(x)


def ones(x):
    """Ones in the shape and dtype of a tensor or variable."""
    return ops.ones(x.shape, dtype=x.dtype) if validation.is_variable(x) else ops.ones_like(x)
