"""Jacobians of recorded operations: in forward or reverse mode, and how many rows or columns at a time."""

import functools
import math

from keras import ops

from keras_gradtools import backend, memory, validation

MODES = ("auto", "forward", "reverse")


class Plan:
    """How to compute the Jacobian of each of `targets` with respect to each of `sources`.

    In reverse mode each target is one part: its unit cotangents are carried back to every source. In forward mode each
    source is one part: its unit tangents are carried forward to every target. With `batch_axes`, all examples
    share the same unit vectors, so the result is the Jacobian of each example.

    If all shapes are known, a plan holds no tensors, and can be used after the trace in which it was made.
    """

    def __init__(self, targets, sources, mode, batch_axes=0):
        self.batch_axes = batch_axes
        self._targets = [(_shape(t), validation.dtype_of(t)) for t in targets]
        self._sources = [(_shape(s), validation.dtype_of(s)) for s in sources]
        self.forward = (self._cheaper() if mode == "auto" else mode) == "forward"
        along, across = (self._targets, self._sources)[:: -1 if self.forward else 1]
        # Empty tensors have no derivative to compute.
        self._across = [i for i, (shape, _) in enumerate(across) if not _is_empty(shape)]
        self.counts = [_count(shape[batch_axes:]) if self._across and not _is_empty(shape) else 0 for shape, _ in along]

    @property
    def is_static(self):
        """Whether every dimension is known while tracing."""
        return all(isinstance(n, int) for shape, _ in (*self._targets, *self._sources) for n in shape)

    def _cheaper(self):
        """Forward mode if there are fewer inputs than outputs. Reverse mode otherwise, or if a dimension is unknown."""
        outputs = [_count(shape[self.batch_axes :]) for shape, _ in self._targets]
        inputs = [_count(shape[self.batch_axes :]) for shape, _ in self._sources]
        known = all(isinstance(n, int) for n in (*outputs, *inputs))
        return "forward" if known and sum(inputs) < sum(outputs) else "reverse"

    def rows_within(self, budget, computed):
        """How many rows (or columns) can be computed at once with `budget` bytes. None for all of them.

        `computed` is the number of bytes of all tensors that the recorded call has computed. A row needs at most twice
        as much, in addition to the result: a derivative with respect to each of these tensors, and a product.
        """
        across = self._targets if self.forward else self._sources
        row = sum(memory.bytes_of(shape, dtype) for shape, dtype in across)
        rows = max((budget - computed) // max(2 * computed + row, 1), 1)
        return None if rows >= max(self.counts) else rows

    def stack(self, tape, targets, sources, part, index=None):
        """The rows (or columns) `index` of one part, by default all, stacked on axis 0. None where unconnected."""
        along, across = (targets, sources)[:: -1 if self.forward else 1]
        rows = [None] * len(across)
        if isinstance(self.counts[part], int) and not self.counts[part]:
            return rows
        units = self._units(index, along[part])
        others = [across[i] for i in self._across]
        if self.forward:
            found = backend.pushforward_batch(tape, others, [along[part]], [units])
        else:
            found = backend.pullback_batch(tape, [along[part]], others, [units])
        for i, row in zip(self._across, found, strict=True):
            rows[i] = row
        return rows

    def stacks(self, tape, targets, sources, chunk_size):
        """All rows (or columns) of each part, with None where unconnected."""
        stacks = []
        for part, count in enumerate(self.counts):
            fun = functools.partial(self.stack, tape, targets, sources, part)
            if chunk_size is None or (isinstance(count, int) and chunk_size >= count):
                stacks.append(fun())
            else:
                stacks.append(backend.map_chunks(fun, count, chunk_size))
        return stacks

    def blocks(self, stacks, zero):
        """The Jacobians, one list per target. Unconnected pairs get zeros if `zero`, otherwise None."""
        batch_axes = self.batch_axes
        blocks = []
        for t, (target_shape, _) in enumerate(self._targets):
            row = []
            for s, (source_shape, dtype) in enumerate(self._sources):
                stack = stacks[s][t] if self.forward else stacks[t][s]
                shape = (*target_shape, *source_shape[batch_axes:])
                if stack is None:
                    row.append(ops.zeros(shape, dtype=dtype) if zero or _is_empty(shape) else None)
                    continue
                if self.forward:
                    # Both modes return the dtype of the source.
                    stack = ops.cast(ops.moveaxis(stack, 0, -1), dtype)
                elif batch_axes:
                    stack = ops.swapaxes(stack, 0, 1)
                row.append(ops.reshape(stack, shape))
            blocks.append(row)
        return blocks

    def _units(self, index, like):
        """The unit vectors at `index`, by default all, in the shape of `like`. An index past the end gives zeros."""
        shape = _shape(like)
        element = shape[self.batch_axes :]
        count = _count(element)
        if index is None and isinstance(count, int):
            unit = ops.eye(count, dtype=like.dtype)
        else:
            every = ops.arange(count, dtype="int32")
            unit = ops.cast(ops.equal((every if index is None else index)[:, None], every[None, :]), like.dtype)
        unit = ops.reshape(unit, (-1, *[1] * self.batch_axes, *element))
        return ops.broadcast_to(unit, (ops.shape(unit)[0], *shape)) if self.batch_axes else unit


def jacobians(tape, targets, sources, mode, chunk_size, zero, batch_axes=0):
    """The Jacobian of each of `targets` with respect to each of `sources`, as a list of lists.

    Their shapes are `target + source`, or `(batch, *target, *source)` with `batch_axes=1`. `tape` is a backend tape.
    """

    def compute(tape):
        plan = Plan(targets, sources, mode, batch_axes)
        return plan.blocks(plan.stacks(tape, targets, sources, chunk_size), zero)

    if mode != "reverse" or chunk_size is not None or len(targets) > 1:
        return compute(tape)
    return [backend.kept(tape, targets[0], sources, (batch_axes, zero), lambda tape: compute(tape)[0])]


def _is_empty(shape):
    # A dimension that is unknown while tracing is a tensor, which must not be compared in Python.
    return any(isinstance(n, int) and n == 0 for n in shape)


def _count(shape):
    """The number of elements. A tensor if a dimension is unknown while tracing."""
    if all(isinstance(n, int) for n in shape):
        return math.prod(shape)
    return ops.prod(ops.stack([ops.cast(n, "int32") for n in shape]))


def _shape(x):
    """The shape, with a tensor for each dimension that is unknown while tracing."""
    shape = tuple(x.shape)
    return tuple(ops.shape(x)) if None in shape else shape


def require_mode(owner, mode, advice=""):
    """Returns `mode`. Raises `ValueError` unless it is one of `MODES`. `advice` ends the message."""
    return validation.require_choice(owner, "mode", mode, MODES, advice)


def require_chunk_size(owner, chunk_size, may_be_auto=False):
    """Returns `chunk_size` as an int or None, or an allowed "auto". Raises `ValueError` for anything else."""
    if may_be_auto and validation.is_one_of(chunk_size, ("auto",)):
        return chunk_size
    if may_be_auto and isinstance(chunk_size, str):
        raise validation.refused(owner, 'a positive integer, "auto", or None,', "chunk_size", chunk_size)
    return validation.require_count(owner, "chunk_size", chunk_size, may_be_none=True)


def rows_at_once(owner, chunk_size, parallel_iterations, experimental_use_pfor):
    """Combines `chunk_size` with TensorFlow's two arguments for the same purpose into one `chunk_size`."""
    validation.require_flag(owner, "experimental_use_pfor", experimental_use_pfor)
    chunk_size = require_chunk_size(owner, chunk_size)
    parallel_iterations = validation.require_count(owner, "parallel_iterations", parallel_iterations, may_be_none=True)
    if parallel_iterations is not None:
        if chunk_size not in (None, parallel_iterations):
            raise ValueError(
                "parallel_iterations is another name for chunk_size: give one of them. Received: "
                f"{parallel_iterations} and {chunk_size}."
            )
        chunk_size = parallel_iterations
    return chunk_size if experimental_use_pfor else 1


def require_same_batch(name, target, source):
    """Raises `ValueError` unless both are of shape `(batch, ...)`, with the same number of examples."""
    for role, x in (("target", target), ("source", source)):
        if len(x.shape) < 2:
            raise ValueError(
                f"{name} needs a {role} of shape (batch, ...) and of rank 2 or more. Received: "
                f"{validation.describe(x)}. Add an axis with `keras.ops.expand_dims(x, -1)` where the tensor is "
                "computed, or use `jacobian`."
            )
    a, b = target.shape[0], source.shape[0]
    if a is not None and b is not None and a != b:
        raise ValueError(
            f"{name} needs the same batch size in target and source. Received: a target "
            f"of shape {tuple(target.shape)} and a source of shape {tuple(source.shape)}."
        )
