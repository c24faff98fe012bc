"""Checks of the arguments of public functions, and their error messages."""

import functools
import math
import numbers

import keras
import numpy as np

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


def shown(x):
    """A received value for an error message: its `repr` if it is plain, otherwise its kind, dtype and shape."""
    parts = x if isinstance(x, (list, tuple)) else [x]
    is_plain = all(part is None or isinstance(part, (str, numbers.Number)) for part in parts)
    return f"{x!r:.80}" if is_plain else describe(x)


def is_variable(x):
    """Whether `x` is a Keras variable of the current backend."""
    return isinstance(x, keras.Variable)


def has_derivative(x):
    """Whether `x` is a real floating-point tensor or Keras variable."""
    return (keras.ops.is_tensor(x) or is_variable(x)) and _is_real_floating(dtype_of(x))


def is_constant(x):
    """Whether `x` is of a kind that has no derivative, and that may be in a structure next to leaves that have one.

    These are None, strings, integers, booleans, arrays of them, and functions.
    """
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return not isinstance(x, keras.KerasTensor) and dtype_of(x).startswith(("int", "uint", "bool", "str", "key"))
    if callable(x):
        return not isinstance(x, (keras.Layer, keras.KerasTensor))
    return x is None or isinstance(x, (str, bytes, numbers.Integral))


def _is_real_floating(dtype):
    return dtype.startswith("float") or dtype == "bfloat16"


def is_any_variable(x):
    """Whether `x` is a Keras variable or a `tf.Variable`."""
    return is_variable(x) or (keras.ops.is_tensor(x) and hasattr(x, "assign"))


def require_differentiable(x, role):
    """Raises `ValueError` unless `x` is a real floating-point tensor or Keras variable."""
    if not (is_variable(x) or keras.ops.is_tensor(x)):
        raise ValueError(
            f"{role} must be a tensor of the backend or a keras.Variable (or a nested structure of these). "
            f"Received: {describe(x)}.{_conversion_hint(x)}"
        )
    require_real_floating(x, role)


def require_real_floating(x, role):
    """Raises `ValueError` unless the dtype of `x`, a tensor of any kind, is real and floating-point."""
    dtype = dtype_of(x)
    if not _is_real_floating(dtype):
        what = "Complex" if dtype.startswith("complex") else "Only floating-point"
        can = "values are not supported" if what == "Complex" else "values have a gradient"
        raise ValueError(
            f"{role} must be real and floating-point. Received: {describe(x)}. {what} {can}: "
            "convert it with `keras.ops.cast(x, 'float32')` before the tape's block uses it"
            + (", or take the real and the imaginary part." if what == "Complex" else ".")
        )


def require_some_differentiable(leaves, role):
    """Raises `ValueError` unless a leaf has a derivative, and every other leaf is of a kind that has none."""
    for x in leaves:
        if not is_constant(x):
            require_differentiable(x, role)
    if leaves and not any(map(has_derivative, leaves)):
        require_differentiable(leaves[0], role)


def as_tensors(owner, name, x):
    """Returns `x`, a nested structure of arrays, as tensors. Raises `ValueError` for values that are not numeric."""
    leaves = nesting.flatten(x)
    if not leaves:
        raise ValueError(f"{owner} expects tensors or arrays as `{name}`. Received: {name}={shown(x)}.")
    return nesting.map_structure(lambda leaf: as_tensor(leaf, f"{owner} expects tensors or arrays as `{name}`"), x)


def require_examples(owner, x):
    """Returns `x`, a nested structure of arrays of shape `(batch, ...)`, as tensors. Raises `ValueError` for others."""
    tensors = as_tensors(owner, "x", x)
    if any(not len(leaf.shape) for leaf in nesting.flatten(tensors)):
        raise ValueError(f"{owner} expects examples of shape (batch, ...) as `x`. Received: x={shown(x)}.")
    return tensors


def as_tensor(x, expected, dtype=None, may_be_complex=False):
    """Returns `x` as a tensor. Raises `ValueError`, beginning with `expected`, if it does not hold real numbers."""
    if not keras.ops.is_tensor(x):
        if isinstance(x, keras.KerasTensor):
            raise ValueError(f"{expected}. Received: {describe(x)}. A symbolic tensor has no values.")
        try:
            x_given, x = x, keras.ops.convert_to_tensor(x, dtype=dtype)
        except Exception:  # each framework raises its own class
            raise ValueError(f"{expected}. Received: {shown(x)}.") from None
        if dtype_of(x) == "string":
            raise ValueError(f"{expected}. Received: {shown(x_given)}.")
    if dtype_of(x).startswith("complex") and not may_be_complex:
        raise ValueError(f"{expected}, of real numbers. Received: {describe(x)}.")
    return x


def as_array(x, expected):
    """Returns `x` as a NumPy array. Raises `ValueError`, beginning with `expected`, if it is not numeric."""
    found = None
    if x is not None and not isinstance(x, keras.KerasTensor):
        try:
            found = keras.ops.convert_to_numpy(x) if keras.ops.is_tensor(x) or is_variable(x) else np.asarray(x)
        except Exception:  # each framework raises its own class
            found = None
    if found is None or (found.dtype.kind not in "fiub" and dtype_of(found) != "bfloat16"):
        raise ValueError(f"{expected}. Received: {shown(x)}.")
    return found


_OR_NONE = ", or None,"


def require_flag(owner, name, x):
    """Returns `x` as a bool. Raises `ValueError` for anything else."""
    if not isinstance(x, (bool, np.bool_)):
        raise refused(owner, "True or False", name, x)
    return bool(x)


def require_count(owner, name, x, least=1, may_be_none=False):
    """Returns `x` as an int. Raises `ValueError` unless it is an integer of at least `least`, or an allowed None."""
    if x is None and may_be_none:
        return None
    if not is_count(x, least):
        what = "a positive integer" if least == 1 else f"an integer of {least} or more"
        raise refused(owner, what + _OR_NONE * may_be_none, name, x)
    return int(x)


def require_seed(owner, seed, may_be_none=False, may_be_generator=False):
    """Returns `seed`, an integer of 0 or more as an int. Raises `ValueError` unless it is that or an alternative."""
    if may_be_none and seed is None or may_be_generator and isinstance(seed, keras.random.SeedGenerator):
        return seed
    if not is_count(seed, 0):
        others = ", a keras.random.SeedGenerator" * may_be_generator + _OR_NONE * may_be_none
        raise refused(owner, f"an integer of 0 or more{others}", "seed", seed)
    return int(seed)


def require_number(owner, name, x, least=-math.inf, above=-math.inf, below=math.inf, may_be_none=False, advice=""):
    """Returns `x` as a float. Raises `ValueError` unless it is a finite number within the bounds, or an allowed None.

    It is at least `least`, greater than `above`, and less than `below`. `advice` says what to do about others.
    """
    if x is None and may_be_none:
        return None
    if not is_number(x) or not (least <= x and above < x < below):
        raise refused(owner, _range(least, above, below) + _OR_NONE * may_be_none, name, x, advice)
    return float(x)


def _range(least, above, below):
    if below < math.inf:
        return f"a number between {max(least, above):g} and {below:g}"
    if least > -math.inf:
        return f"a number of {least:g} or more"
    return "a positive number" if above == 0 else f"a number above {above:g}" if above > 0 else "a finite number"


def require_choice(owner, name, x, choices):
    """Returns `x`. Raises `ValueError` unless it is one of `choices`."""
    if not is_one_of(x, choices):
        *others, last = map(repr, choices)
        raise refused(owner, f"{', '.join(others)} or {last}", name, x)
    return x


def require_verbose(owner, verbose):
    """Returns `verbose`. Raises `ValueError` unless it is one that a progress bar takes."""
    return require_choice(owner, "verbose", verbose, ("auto", 0, 1))


def refused(owner, expected, name, received, advice=""):
    """The `ValueError` for the argument `name`. It says what was expected and received, and what to do."""
    given = f"Received: {name}={shown(received)}."
    return ValueError(f"{owner} expects {expected} as `{name}`. {given}" + (f" {advice}" if advice else ""))


# Names for which `compile` chooses the cross-entropy that fits the labels.
LOSSES_BY_THE_LABELS = ("crossentropy", "ce")


def require_loss(owner, loss):
    """Raises `ValueError` unless `keras.Model.compile` accepts `loss`. None stands for the loss of the model."""
    for each in keras.tree.flatten(loss) if isinstance(loss, (dict, list, tuple)) else [loss]:
        is_loss = each is None or (callable(each) and not isinstance(each, keras.KerasTensor))
        if isinstance(each, str):
            try:
                is_loss = each in LOSSES_BY_THE_LABELS or callable(keras.losses.get(each))
            except ValueError:
                is_loss = False
        if not is_loss:
            raise ValueError(
                f"{owner} expects a `loss` as for `compile`: the name of a Keras loss, a keras.losses.Loss, or a "
                f"function (y_true, y_pred). Received: loss={shown(each)}."
            )


DATA = "(x, y) or (x, y, sample_weight), a tf.data.Dataset, a keras.utils.PyDataset or a torch DataLoader"


def require_data(owner, data):
    """Raises `ValueError` unless `data` is a tuple of two or three arrays or an iterable of batches."""
    is_array = hasattr(data, "shape") or isinstance(data, (str, bytes, dict, set, frozenset))
    is_batches = hasattr(data, "__iter__") or isinstance(data, keras.utils.PyDataset)
    if is_array or not is_batches or (isinstance(data, tuple) and len(data) not in (2, 3)):
        advice = "Give the list of the batches that it returns, `list(data())`." if callable(data) else ""
        raise refused(owner, DATA, "data", data, advice)


def require_variables(owner, variables):
    """Raises `ValueError` unless `variables` is a nested structure of Keras variables, a layer, or None."""
    if variables is None or isinstance(variables, keras.Layer):
        return
    leaves = nesting.flatten(variables)
    wrong = [x for x in leaves if not is_variable(x)]
    if wrong or not leaves:
        raise ValueError(
            f"{owner} expects as `variables` keras.Variables of the model, in any nested structure, or one of its "
            "layers. "
            f"Received: {describe(wrong[0]) if wrong else describe(variables)}."
        )


def require_callable_model(owner, model):
    """Raises `ValueError` unless `model` can be called."""
    if not callable(model) or isinstance(model, keras.KerasTensor):
        raise ValueError(f"{owner} expects a Keras model or a function as `model`. Received: {describe(model)}.")


def require_built(owner, model):
    """Raises `ValueError` unless the Keras model or layer `model` has its weights."""
    if not model.built:
        raise ValueError(
            f"{owner} expects a built model. Received: the unbuilt model {model.name!r}. Give it a keras.Input, or "
            "call it on data once."
        )


def _conversion_hint(x):
    if isinstance(x, keras.KerasTensor):
        return " A symbolic tensor has no values: use the tape inside a layer's `call`, or on a model called with data."
    if x is None or isinstance(x, str):
        return ""
    if isinstance(x, np.ndarray):
        return (
            " Convert it with `keras.ops.convert_to_tensor` and use the result inside the tape's block. (Keras hands "
            "NumPy arrays to `call` and `compute_loss` where it does not compile the step: `run_eagerly=True`, on JAX "
            "`jit_compile=False`, on torch always in `train_on_batch`.)"
        )
    return " Convert it with `keras.ops.convert_to_tensor` and use the result inside the tape's block."


def require_same_structure(given, expected, role, of):
    """Raises `ValueError` unless `given` has the structure of `expected`."""
    if not nesting.same_structure(expected, given):
        raise _another_structure(given, expected, role, of)


def matched(given, expected, role, of):
    """The leaves of `given` in the structure of `expected`. A None may stand for a whole branch.

    Raises `ValueError` if the structures differ.
    """
    leaves = nesting.outline(expected).matched(given)
    if leaves is None:
        raise _another_structure(given, expected, role, of)
    return leaves


def _another_structure(given, expected, role, of):
    return ValueError(
        f"{role} must have the structure of {of}. Expected the structure {nesting.outline(expected)}. Received: "
        f"{nesting.outline(given)}."
    )


def require_shape(x, shape, role, of):
    """Raises `ValueError` unless the static shape of `x` agrees with `shape` (None agrees with anything)."""
    given, expected = tuple(x.shape), tuple(shape)
    agree = len(given) == len(expected) and all(
        a is None or b is None or a == b for a, b in zip(given, expected, strict=True)
    )
    if not agree:
        raise ValueError(f"{role} must have the shape of {of}, {expected}. Received: {describe(x)}.")
