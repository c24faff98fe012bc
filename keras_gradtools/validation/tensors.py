"""Checks of tensors, arrays, and nested structures of them."""

import keras
import numpy as np

from keras_gradtools import nesting
from keras_gradtools.validation.descriptions import describe, dtype_of, shown
from keras_gradtools.validation.kinds import has_derivative, is_constant, is_real_floating, is_variable


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
    if not is_real_floating(dtype):
        what = "Complex" if dtype.startswith("complex") else "Only floating-point"
        can = "values are not supported" if what == "Complex" else "values have a gradient"
        raise ValueError(
            f"{role} must be real and floating-point. Received: {describe(x)}. {what} {can}: "
            "convert it with `keras.ops.cast(x, 'float32')` before the tape's block uses it"
            + (", or take the real and the imaginary part." if what == "Complex" else ".")
        )


# Classes of TensorFlow and JAX. torch's tensors have a layout instead.
_COMPRESSED = {"RaggedTensor", "SparseTensor", "IndexedSlices", "JAXSparse"}


def require_dense(tensors, role):
    """Raises `ValueError` if one of the tensors is sparse or ragged: there is no common form of its gradient."""
    for x in tensors:
        layout = str(x.layout) if hasattr(x, "is_sparse") else "torch.strided"
        is_compressed = any(cls.__name__ in _COMPRESSED for cls in type(x).__mro__)
        if is_compressed or layout != "torch.strided":
            which = f" of layout {layout}" if layout != "torch.strided" else ""
            raise ValueError(
                f"{role} must be dense. Received: a {type(x).__name__}{which}. Differentiate with respect to a dense "
                "tensor of its values, and make the sparse or ragged tensor from these inside the function or block."
            )


def _conversion_hint(x):
    if isinstance(x, keras.KerasTensor):
        return " A symbolic tensor has no values: use the tape inside a layer's `call`, or on a model called with data."
    if x is None or isinstance(x, str):
        return ""
    if isinstance(x, keras.Layer):
        return " Pass its variables: `model.trainable_variables`."
    if isinstance(x, (np.ndarray, np.generic)):
        return (
            " A tape does not see what NumPy computes: inside the block, use `keras.ops` in place of NumPy. Convert "
            "inputs with `keras.ops.convert_to_tensor` before the block uses them. (Keras hands "
            "NumPy arrays to `call` and `compute_loss` where it does not compile the step: `run_eagerly=True`, on JAX "
            "`jit_compile=False`, on torch always in `train_on_batch`.)"
        )
    return " Convert it with `keras.ops.convert_to_tensor` and use the result inside the tape's block."


def require_some_differentiable(leaves, role):
    """Raises `ValueError` unless some leaf has a derivative and all others are of a kind that has none."""
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
