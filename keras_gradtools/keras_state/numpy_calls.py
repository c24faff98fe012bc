"""Warns when a NumPy function is called on a tensor that a tape records.

NumPy converts the tensor to an array, which is a constant for every derivative: `d/dx np.sin(x)` would silently be
zero. While a tape is recording, the classes of `install` take part in NumPy's two dispatch protocols,
`__array_ufunc__` and `__array_function__`, so that NumPy asks them first. The result stays what it is without them.
An explicit conversion (`np.asarray(x)`, `keras.ops.convert_to_numpy(x)`, `float(x)`) is not dispatched, and means a
constant.
"""

import threading
import warnings

import keras
import numpy as np

from keras_gradtools.keras_internals.variables import Variable
from keras_gradtools.keras_state import recording

# `array + tensor` arrives as `np.add(array, tensor)`, but the operator belongs to the tensor.
_REFLECTED = {
    "add": "__radd__",
    "subtract": "__rsub__",
    "multiply": "__rmul__",
    "divide": "__rtruediv__",
    "floor_divide": "__rfloordiv__",
    "remainder": "__rmod__",
    "power": "__rpow__",
    "matmul": "__rmatmul__",
    "divmod": "__rdivmod__",
    "less": "__gt__",
    "less_equal": "__ge__",
    "greater": "__lt__",
    "greater_equal": "__le__",
    "equal": "__eq__",
    "not_equal": "__ne__",
    "bitwise_and": "__rand__",
    "bitwise_or": "__ror__",
    "bitwise_xor": "__rxor__",
    "left_shift": "__rlshift__",
    "right_shift": "__rrshift__",
}

_warned_of: set = set()


class _Thread(threading.local):
    # Whether a NumPy function is running, which may call others: only the outermost one is named.
    is_inside = False


_thread = _Thread()


class _WhileRecording:
    """An attribute that a class has only on a thread that records: NumPy looks it up at every call."""

    def __init__(self, function):
        self._function = function

    def __get__(self, instance, owner=None):
        if not recording.active_tapes():
            raise AttributeError("Only present while a tape is recording.")
        return self._function if instance is None else self._function.__get__(instance, owner)


def install(tensor_class, is_recorded):
    """Watches NumPy's calls on instances of `tensor_class`; `is_recorded(x)` says whether a tape records `x`."""

    def found(structure):
        if isinstance(structure, tuple | list):
            return any(map(found, structure))
        return isinstance(structure, tensor_class) and is_recorded(structure)

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        if method == "__call__" and len(inputs) == 2 and not kwargs and isinstance(inputs[0], np.ndarray | np.generic):
            operator = getattr(type(self), _REFLECTED.get(ufunc.__name__, ""), None)
            result = NotImplemented if operator is None else operator(self, inputs[0])
            if result is not NotImplemented:
                return result
        arrays = [np.asarray(x) if isinstance(x, tensor_class) else x for x in inputs]
        result = getattr(ufunc, method)(*arrays, **kwargs)
        return _checked(result, ufunc, found(inputs))

    def __array_function__(self, function, types, args, kwargs):
        # What NumPy itself runs for classes without the protocol.
        outermost, _thread.is_inside = not _thread.is_inside, True
        try:
            result = function._implementation(*args, **kwargs)
        finally:
            _thread.is_inside = not outermost
        return _checked(result, function, found((args, list(kwargs.values()))))

    tensor_class.__array_ufunc__ = _WhileRecording(__array_ufunc__)
    tensor_class.__array_function__ = _WhileRecording(__array_function__)


def install_for_variables():
    """Watches NumPy's calls on Keras variables."""
    install(Variable, lambda variable: any(tape.wants(variable) for tape in recording.active_tapes()))


def _checked(result, function, is_recorded):
    """Returns `result`, after a warning if it is a constant that was computed from a recorded tensor."""
    name = function.__name__
    if is_recorded and not _thread.is_inside and name not in _warned_of and _is_constant_number(result):
        _warned_of.add(name)
        instead = f"`keras.ops.{name}`" if hasattr(keras.ops, name) else "a function of `keras.ops`"
        warnings.warn(
            f"`numpy.{name}` was called on a tensor that is being differentiated. Its result is a NumPy array, which "
            f"is a constant for every derivative. Use {instead} instead. If you want a constant, say so by "
            "`keras.ops.convert_to_numpy(x)`. This warning is shown once for each NumPy function.",
            # The caller of NumPy: two frames above, the hook's and this one.
            stacklevel=3,
        )
    return result


def _is_constant_number(result):
    if isinstance(result, tuple | list):
        return any(map(_is_constant_number, result))
    return isinstance(result, np.ndarray | np.generic) and np.issubdtype(result.dtype, np.inexact)
