"""What kind of value an argument is."""

import numbers

import keras

from keras_gradtools.validation.descriptions import dtype_of


def is_number(x):
    """Whether `x` is a real Python number and not a bool."""
    return isinstance(x, numbers.Real) and type(x) is not bool


def is_count(x, least=1):
    """Whether `x` is an integer of Python or NumPy of at least `least`, and not a bool."""
    # NumPy's bool is not an `Integral`.
    return isinstance(x, numbers.Integral) and not isinstance(x, bool) and bool(x >= least)  # type: ignore[unreachable]


def is_one_of(x, choices):
    """Whether `x` is one of `choices` (strings, numbers or None). False for other types, such as arrays."""
    return (x is None or isinstance(x, (str, numbers.Real))) and not isinstance(x, bool) and x in choices


def is_variable(x):
    """Whether `x` is a Keras variable of the current backend."""
    return isinstance(x, keras.Variable)


def is_any_variable(x):
    """Whether `x` is a Keras variable or a `tf.Variable`."""
    return is_variable(x) or (keras.ops.is_tensor(x) and hasattr(x, "assign"))


def has_derivative(x):
    """Whether `x` is a real floating-point tensor or Keras variable."""
    return (keras.ops.is_tensor(x) or is_variable(x)) and is_real_floating(dtype_of(x))


def is_constant(x):
    """Whether `x` is of a kind that has no derivative, and that may be in a structure next to leaves that have one.

    These are None, strings, integers, booleans, arrays of them, and functions.
    """
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return not isinstance(x, keras.KerasTensor) and dtype_of(x).startswith(("int", "uint", "bool", "str", "key"))
    if callable(x):
        return not isinstance(x, (keras.Layer, keras.KerasTensor))
    return x is None or isinstance(x, (str, bytes, numbers.Integral))


def is_real_floating(dtype):
    """Whether the dtype of this name is real and floating-point."""
    return dtype.startswith("float") or dtype == "bfloat16"
