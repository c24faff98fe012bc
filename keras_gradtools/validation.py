"""What the public functions accept, and the words in which they refuse the rest."""

import functools
import numbers

import keras

from keras_gradtools import nesting


def describe(x):
    """Names a value for an error message: its kind, dtype and shape where it has them."""
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


# Entries of a container that an outline has.
_ENTRIES = 5


def _outline(x):
    """A container as Python writes it, with dtypes and shapes in the place of the tensors and arrays in it."""
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
    return repr(x)


def dtype_of(x):
    """The dtype as Keras spells it, or as the framework does where Keras has no word for it."""
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


def is_number(x):
    """Whether `x` is a real Python number; a bool is none."""
    return isinstance(x, numbers.Real) and type(x) is not bool


def is_variable(x):
    """Whether `x` is a Keras variable of the current backend."""
    return isinstance(x, keras.Variable)


def require_differentiable(x, role, hint=""):
    """Raises `ValueError` unless `x` is a real floating-point tensor or Keras variable."""
    if not (is_variable(x) or keras.ops.is_tensor(x)):
        raise ValueError(
            f"{role} must be a tensor of the backend or a keras.Variable (or a nesting of these). "
            f"Received: {describe(x)}.{hint or _conversion_hint(x)}"
        )
    dtype = dtype_of(x)
    if not (dtype.startswith("float") or dtype == "bfloat16"):
        what = "Complex" if dtype.startswith("complex") else "Only floating-point"
        can = "values are not supported" if what == "Complex" else "values have a gradient"
        raise ValueError(
            f"{role} must be real and floating-point. Received: {describe(x)}. {what} {can}: "
            "convert it with `keras.ops.cast(x, 'float32')` before the tape's block uses it"
            + (", or take the real and the imaginary part." if what == "Complex" else ".")
        )


def _conversion_hint(x):
    if isinstance(x, keras.KerasTensor):
        return " A symbolic tensor has no values: use the tape inside a layer's `call`, or on a model called with data."
    if x is None or isinstance(x, str):
        return ""
    return " Convert it with `keras.ops.convert_to_tensor` and use the result inside the tape's block."


def require_same_structure(given, expected, role, of):
    """Raises `ValueError` unless `given` is nested as `expected` is."""
    if not nesting.same_structure(given, expected):
        raise ValueError(
            f"{role} must have the structure of {of}. Expected the structure "
            f"{nesting.map_structure(lambda _: '*', expected)}. Received: "
            f"{nesting.map_structure(lambda _: '*', given)}."
        )


def require_shape(x, shape, role, of):
    """Raises `ValueError` unless the static shape of `x` agrees with `shape` (None agrees with anything)."""
    given, expected = tuple(x.shape), tuple(shape)
    agree = len(given) == len(expected) and all(
        a is None or b is None or a == b for a, b in zip(given, expected, strict=True)
    )
    if not agree:
        raise ValueError(f"{role} must have the shape of {of}, {expected}. Received: {describe(x)}.")
