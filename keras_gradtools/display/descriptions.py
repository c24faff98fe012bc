"""Short descriptions of numbers, arrays and other values of a result."""

import enum
import numbers

import numpy as np

# Vectors up to this length are shown with their elements, and longer strings than this are cut off.
_FEW, _LONGEST = 4, 200
_DIGITS = 6


def short(value):
    """A value in a few words: a number with six digits, an array by its dtype, its shape and its range."""
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, (bool, np.bool_)) or value is None:
        return str(value)
    if isinstance(value, (numbers.Integral, np.integer)):
        return str(int(value))
    if isinstance(value, (numbers.Real, np.floating)):
        return number(value)
    if isinstance(value, np.ndarray):
        return _of_array(value)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        # The values of a tensor may be unknown, or on a device.
        return f"<{str(value.dtype).removeprefix('torch.')} tensor {tuple(value.shape)}>"
    if isinstance(value, (tuple, list)):
        if len(value) > _FEW or not all(isinstance(x, (str, numbers.Number)) for x in value):
            return f"<{len(value)} {_kind(value)}>"
        inside = ", ".join(map(short, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' * (len(value) == 1)})"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def number(x):
    """A real number with at most six digits, as Python writes it."""
    return repr(float(f"{float(x):.{_DIGITS}g}"))


def _kind(values):
    name = {type(x).__name__ for x in values}
    return f"x {name.pop()}" if len(name) == 1 else "items"


def _of_array(array):
    if array.ndim == 0:
        return short(array[()])
    if array.ndim == 1 and array.size <= _FEW:
        return f"[{', '.join(short(x) for x in array)}]"
    what = f"{array.dtype} {array.shape}"
    if array.dtype == bool:
        return f"<{what}, {int(array.sum())} true>"
    if array.dtype.kind not in "iuf" or not array.size:
        return f"<{what}>"
    finite = array[np.isfinite(array)]
    if not finite.size:
        return f"<{what}, none finite>"
    bounds = f"{short(finite.min())} to {short(finite.max())}"
    left = array.size - finite.size
    return f"<{what}, {bounds}{f', {left} not finite' if left else ''}>"
