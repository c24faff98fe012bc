"""The variables of a curvature operator, and vectors over them: flat, in columns, or in the variables' structure."""

import functools
import itertools
import math

import keras
import numpy as np
from keras import ops

from keras_gradtools import backend, nesting, validation
from keras_gradtools.curvature.operators.solver_vectors import solver_dtype
from keras_gradtools.tape import vectors
from keras_gradtools.training.undone_by_errors import undone_by_errors


class Parameters:
    """Trainable variables of a model as one flat vector of length `size`.

    The elements of the i-th variable are in `slices[i]`, in the order of `keras.ops.reshape(v, -1)`.
    """

    def __init__(self, owner, model, variables):
        self._owner = owner
        chosen = _chosen(owner, model, variables)
        self.structure = nesting.map_structure(lambda _: 0, chosen)
        self.variables = nesting.flatten(chosen)
        self.shapes = [tuple(v.shape) for v in self.variables]
        sizes = [math.prod(shape) for shape in self.shapes]
        ends = list(itertools.accumulate(sizes))
        self.slices = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        self.size = ends[-1]
        self.dtype = _common_dtype(owner, {v.dtype for v in self.variables})

    def variables_as_tensors(self):
        """The current values, a tensor for each variable."""
        return [ops.stop_gradient(ops.convert_to_tensor(v)) for v in self.variables]

    def moved(self, offset):
        """The current values plus a flat vector, or plus None."""
        weights = self.variables_as_tensors()
        if offset is None:
            return weights
        parts = self.split(ops.convert_to_tensor(offset))
        return [w + part for w, part in zip(weights, parts, strict=True)]

    def move(self, offset):
        """Adds a flat vector to the variables. If this fails or is interrupted, all of them are restored."""
        moved = self._moved(offset)
        block = undone_by_errors(self.variables)
        with block, block:
            for v, value in zip(self.variables, moved, strict=True):
                v.assign(value)

    @functools.cached_property
    def _moved(self):
        return backend.jit(self.moved)

    def flat(self, name, given):
        """A vector in any form that `received` accepts as a flat array or tensor. Raises `ValueError` for columns."""
        if isinstance(given, np.ndarray) and given.shape == (self.size,) and given.dtype.kind == "f":
            return given.astype(solver_dtype(self.dtype), copy=False)
        parts, columns, _ = self.received(given)
        if columns is not None:
            raise ValueError(f"{name} expects one vector as `offset`. Received: {columns} columns.")
        return self.joined(parts)

    def split(self, vectors):
        """A vector `(n,)`, or a stack of vectors `(k, n)` with a leading axis, as a tensor for each variable."""
        stack = tuple(vectors.shape[:-1])
        is_array = isinstance(vectors, np.ndarray)
        split, reshape = (np.split, np.reshape) if is_array else (ops.split, ops.reshape)
        ends = [place.stop for place in self.slices[:-1]]
        return [
            ops.convert_to_tensor(reshape(part, (*stack, *shape)), dtype=v.dtype)
            for part, shape, v in zip(
                split(vectors, ends, axis=-1) if ends else [vectors], self.shapes, self.variables, strict=True
            )
        ]

    def joined(self, parts, stack=()):
        """The inverse of `split`."""
        flat = [
            ops.cast(ops.reshape(part, (*stack, place.stop - place.start)), self.dtype)
            for part, place in zip(parts, self.slices, strict=True)
        ]
        return flat[0] if len(flat) == 1 else ops.concatenate(flat, axis=-1)

    def joined_in_numpy(self, parts, stack=()):
        """The same as `joined`, as a NumPy array."""
        flat = [
            # The size is explicit, because -1 is ambiguous if the stack is empty.
            ops.convert_to_numpy(ops.cast(part, self.dtype)).reshape(*stack, place.stop - place.start)
            for part, place in zip(parts, self.slices, strict=True)
        ]
        return np.concatenate(flat, axis=-1)

    def zeros(self, stack=()):
        """Zeros to which products are added: a tensor for each variable, in the common dtype."""
        return [ops.zeros((*stack, *shape), dtype=self.dtype) for shape in self.shapes]

    def received(self, given):
        """Converts the right operand of `@`. Returns `(parts, columns, in_kind)`.

        `parts` are tensors, one for each variable. `columns` is the number of columns of a matrix, which are the first
        axis of the tensors, or None for a single vector. `in_kind` converts a result back to the form of the operand.
        """
        if isinstance(given, keras.KerasTensor):
            raise self._refused(given)
        if nesting.is_nested(given):
            if not all(map(validation.is_number, nesting.flatten(given))):
                return self._received_structure(given)
            given = np.asarray(nesting.flatten(given))
        is_array = not _is_tensor(given)
        vectors = np.asarray(given) if is_array else ops.convert_to_tensor(given)
        shape = tuple(vectors.shape)
        is_real = validation.dtype_of(vectors).startswith(("float", "bfloat", "int", "uint", "bool"))
        if not is_real or len(shape) not in (1, 2) or shape[0] != self.size:
            raise self._refused(given)
        transpose = np.transpose if is_array else ops.transpose
        columns = shape[1:]

        def in_kind(parts):
            product = (self.joined_in_numpy if is_array else self.joined)(parts, columns)
            return transpose(product) if columns else product

        parts = self.split(transpose(vectors) if columns else vectors)
        return parts, columns[0] if columns else None, in_kind

    def _refused(self, given):
        return ValueError(
            f"{self._owner} multiplies a vector of shape ({self.size},), a matrix of shape ({self.size}, columns), "
            f"or tensors with the structure and shapes of its {len(self.variables)} variables. Received: "
            f"{validation.describe(given)}."
        )

    def _received_structure(self, given):
        leaves = nesting.flatten(given)
        validation.require_same_structure(given, self.structure, "A nested vector", "the variables")
        is_array = not any(map(_is_tensor, leaves))
        parts = [
            vectors.real_tensor(leaf, v.dtype, "Each entry of a nested vector")
            for leaf, v in zip(leaves, self.variables, strict=True)
        ]
        for part, v in zip(parts, self.variables, strict=True):
            validation.require_shape(part, v.shape, "Each entry of a nested vector", f"its variable {v.path!r}")

        def in_kind(parts):
            parts = [ops.cast(part, v.dtype) for part, v in zip(parts, self.variables, strict=True)]
            return nesting.pack_as(given, map(ops.convert_to_numpy, parts) if is_array else parts)

        return parts, None, in_kind


def _is_tensor(x):
    return ops.is_tensor(x) or validation.is_variable(x)


def _common_dtype(owner, dtypes):
    """The widest of the dtypes. Keras' own promotion never goes beyond `floatx`."""
    if not all(map(keras.backend.is_float_dtype, dtypes)):
        raise ValueError(f"{owner} expects floating-point variables. Received: the dtypes {sorted(dtypes)}.")
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return "float64" if "float64" in dtypes else "float32"


def _chosen(owner, model, variables):
    if variables is None:
        chosen = list(model.trainable_variables)
        what = f"the model {model.name!r}"
    elif isinstance(variables, keras.Layer):
        chosen = list(variables.trainable_variables)
        what = f"the layer {variables.name!r}"
    else:
        chosen, what = variables, "`variables`"
    flat = nesting.flatten(chosen)
    if not flat:
        raise ValueError(
            f"{owner} needs at least one trainable variable. Received: none in {what}. Build it first, or set "
            "`trainable` to True."
        )
    known = {id(v) for v in model.variables}
    trainable = {id(v) for v in model.trainable_variables}
    for v in flat:
        if not validation.is_variable(v) or id(v) not in known:
            raise ValueError(
                f"{owner} expects as `variables` keras.Variables of the model {model.name!r}, in any nested "
                f"structure, or one of its layers. Received: {validation.describe(v)}."
            )
        if id(v) not in trainable:
            raise ValueError(
                f"{owner} expects trainable variables. Received: {validation.describe(v)}, which is frozen. Set "
                "`trainable` to True on its layer, or leave it out."
            )
    if len({id(v) for v in flat}) < len(flat):
        raise ValueError(f"{owner} expects each variable once. Received: {[v.path for v in flat]}.")
    return chosen
