"""Jacobians out of a tape's record: in which direction, and how many rows or columns at a time."""

import functools
import math

from keras import ops

from keras_gradtools import backend, validation

MODES = ("auto", "forward", "reverse")


class Plan:
    """How to compute the Jacobian of each of `targets` by each of `sources`.

    In reverse mode each target is a part, whose unit cotangents are pulled back to every source; in forward mode
    each source is one, whose unit tangents are pushed to every target. Behind `batch_axes`, all examples share
    the same unit vectors, so that only the Jacobian of each example alone comes out.

    A plan holds no tensors where all shapes are known, and outlives the trace that it was made in.
    """

    def __init__(self, targets, sources, mode, batch_axes=0):
        self.batch_axes = batch_axes
        self._targets = [(_shape(t), validation.dtype_of(t)) for t in targets]
        self._sources = [(_shape(s), validation.dtype_of(s)) for s in sources]
        self.forward = (self._cheaper() if mode == "auto" else mode) == "forward"
        along, across = (self._targets, self._sources)[:: -1 if self.forward else 1]
        # What is empty has no derivative to compute, and no say in those of the rest.
        self._across = [i for i, (shape, _) in enumerate(across) if not _is_empty(shape)]
        self.counts = [_count(shape[batch_axes:]) if self._across and not _is_empty(shape) else 0 for shape, _ in along]

    @property
    def is_static(self):
        """Whether every dimension is known before the run."""
        return all(isinstance(n, int) for shape, _ in (*self._targets, *self._sources) for n in shape)

    def _cheaper(self):
        """Forward where there are fewer inputs than outputs; reverse where a dimension is not known."""
        outputs = [_count(shape[self.batch_axes :]) for shape, _ in self._targets]
        inputs = [_count(shape[self.batch_axes :]) for shape, _ in self._sources]
        known = all(isinstance(n, int) for n in (*outputs, *inputs))
        return "forward" if known and sum(inputs) < sum(outputs) else "reverse"

    def stack(self, tape, targets, sources, part, index=None):
        """The rows (columns) with the numbers `index` of one part, on axis 0, None where nothing is connected.

        All of them without `index`.
        """
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
        """All rows (columns) of each part; None where there are none."""
        stacks = []
        for part, count in enumerate(self.counts):
            fun = functools.partial(self.stack, tape, targets, sources, part)
            if chunk_size is None or (isinstance(count, int) and chunk_size >= count):
                stacks.append(fun())
            else:
                stacks.append(backend.map_chunks(fun, count, chunk_size))
        return stacks

    def blocks(self, stacks, zero):
        """The Jacobians, a list for each target; where nothing is connected zeros, or None unless `zero`."""
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
                    # As reverse mode has it: the direction changes no dtype.
                    stack = ops.cast(ops.moveaxis(stack, 0, -1), dtype)
                elif batch_axes:
                    stack = ops.swapaxes(stack, 0, 1)
                row.append(ops.reshape(stack, shape))
            blocks.append(row)
        return blocks

    def _units(self, index, like):
        """The unit vectors of these numbers, in the shape of `like`; zero for a number past the last one."""
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
    """The Jacobian of each of `targets` by each of `sources`, a list of lists.

    Of shapes `target + source`, or of each example alone, `(batch, *target, *source)`. `tape` is the backend's.
    """
    plan = Plan(targets, sources, mode, batch_axes)
    return plan.blocks(plan.stacks(tape, targets, sources, chunk_size), zero)


def _is_empty(shape):
    # A dimension that only the run will know is a tensor, and compares as one.
    return any(isinstance(n, int) and n == 0 for n in shape)


def _count(shape):
    """The number of elements: a tensor where only the run will know it."""
    if all(isinstance(n, int) for n in shape):
        return math.prod(shape)
    return ops.prod(ops.stack([ops.cast(n, "int32") for n in shape]))


def _shape(x):
    """The shape, with tensors in the place of the dimensions that only the run will know."""
    return tuple(ops.shape(x))


def checked_mode(mode):
    """Returns `mode`, and raises `ValueError` unless it is one of `MODES`."""
    if not validation.is_one_of(mode, MODES):
        raise ValueError(f"mode must be 'auto', 'forward' or 'reverse'. Received: mode={validation.shown(mode)}.")
    return mode


def checked_chunk_size(chunk_size):
    """Returns `chunk_size` as an int or None, and raises `ValueError` for anything else."""
    if chunk_size is None:
        return None
    if not validation.is_count(chunk_size):
        raise ValueError(
            f"chunk_size must be a positive integer or None. Received: chunk_size={validation.shown(chunk_size)}."
        )
    return int(chunk_size)


def rows_at_once(owner, chunk_size, parallel_iterations, experimental_use_pfor):
    """The `chunk_size`, out of that and of the two arguments that TensorFlow has for it."""
    validation.require_flag(owner, "experimental_use_pfor", experimental_use_pfor)
    chunk_size = checked_chunk_size(chunk_size)
    if parallel_iterations is not None:
        if not validation.is_count(parallel_iterations):
            raise ValueError(
                "parallel_iterations must be a positive integer or None. Received: "
                f"parallel_iterations={validation.shown(parallel_iterations)}."
            )
        if chunk_size not in (None, parallel_iterations):
            raise ValueError(
                "parallel_iterations is another name for chunk_size: give one of them. Received: "
                f"{parallel_iterations} and {chunk_size}."
            )
        chunk_size = int(parallel_iterations)
    return chunk_size if experimental_use_pfor else 1


def check_batch(name, target, source):
    """Raises `ValueError` unless both are of shape `(batch, ...)`, with the same number of examples."""
    for role, x in (("target", target), ("source", source)):
        if len(x.shape) < 2:
            raise ValueError(
                f"{name} needs a {role} of shape (batch, ...) and of rank 2 or more. Received: "
                f"{validation.describe(x)}. Add an axis with `keras.ops.expand_dims(x, -1)` where it is computed, or "
                "use `jacobian`."
            )
    a, b = target.shape[0], source.shape[0]
    if a is not None and b is not None and a != b:
        raise ValueError(
            f"{name} needs the same batch size in target and source. Received: a target "
            f"of shape {tuple(target.shape)} and a source of shape {tuple(source.shape)}."
        )
