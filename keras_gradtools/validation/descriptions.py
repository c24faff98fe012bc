"""Descriptions of values, for error messages."""

import functools
import numbers

import keras

from keras_gradtools import nesting


def describe(x):
    """Describes a value for an error message, by its kind, dtype and shape if it has them."""
    if isinstance(x, keras.Variable):
        return f"the keras.Variable {x.path!r} of dtype {x.dtype} and shape {tuple(x.shape)}"
    if isinstance(x, keras.KerasTensor):
        return f"the symbolic KerasTensor {x.name!r} of dtype {x.dtype} and shape {tuple(x.shape)}"
    if keras.ops.is_tensor(x):
        return f"a tensor of dtype {dtype_of(x)} and shape {tuple(x.shape)}"
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"a {type(x).__name__} of dtype {dtype_of(x)} and shape {tuple(x.shape)}"
    shown = _outline(x) if nesting.is_nested(x) else repr(x)
    return f"{shown:.80} (of type {type(x).__module__}.{type(x).__qualname__})"


# The most entries of a container that an error message shows.
_ENTRIES = 5


def _outline(x):
    """A container as Python writes it, with the dtype and shape of each tensor and array in it."""
    if isinstance(x, dict):
        shown = [f"{key!r}: {_outline(value)}" for key, value in list(x.items())[:_ENTRIES]]
        return f"{{{', '.join(shown)}{', ...' if len(x) > _ENTRIES else ''}}}"
    if isinstance(x, (list, tuple)):
        shown = [_outline(value) for value in x[:_ENTRIES]]
        inside = (
            f"{', '.join(shown)}{', ...' if len(x) > _ENTRIES else ',' if len(x) == 1 and type(x) is tuple else ''}"
        )
        return f"[{inside}]" if isinstance(x, list) else f"({inside})"
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{dtype_of(x)} {tuple(x.shape)}"
    return f"{nesting.outline(x)}" if nesting.is_nested(x) else repr(x)


def shown(x):
    """A received value for an error message: its `repr` if it is plain, otherwise its kind, dtype and shape."""
    parts = x if isinstance(x, (list, tuple)) else [x]
    is_plain = all(part is None or isinstance(part, (str, numbers.Number)) for part in parts)
    return f"{x!r:.80}" if is_plain else describe(x)


def dtype_of(x):
    """The name of the dtype in Keras, or in the framework if Keras has no name for it."""
    return _spelled(x.dtype)


@functools.lru_cache
def _spelled(dtype):
    try:
        return keras.backend.standardize_dtype(dtype)
    except (ValueError, TypeError):
        return str(dtype)


def name_of(fun):
    """The name of a function for an error message."""
    return getattr(fun, "__name__", type(fun).__name__)
