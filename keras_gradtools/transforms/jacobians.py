"""Jacobians of functions and models: full ones, and those of each example alone."""

import functools
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_gradtools import jacobians, nesting, validation
from keras_gradtools.transforms import compiled
from keras_gradtools.transforms.batch_independence import examine
from keras_gradtools.transforms.first_order import grad
from keras_gradtools.transforms.taped_call import TapedCall, require_argnums, require_function


def jacobian(fun, argnums=0, mode="auto", chunk_size=None):
    r"""Turns a function into its Jacobian, $J_{k i} = \partial f_k / \partial x_i$.

    Called eagerly, it is compiled, and kept for the same `fun`, shapes and dtypes: `fun`'s Python does not run
    again. The Keras variables that `fun` reads are read anew at each call; what else around it may change is told at
    `jit` (`kg.GradientTape` has no such rule). A `fun` whose Python depends on values runs eagerly, with a
    warning. On torch all of it runs eagerly. What `fun` assigns to variables is dropped.

    Args:
        fun: a function that returns real floating-point tensors, in any nesting.
        argnums: the position of the argument to differentiate by, or a tuple of positions. These arguments are
            real floating-point tensors, variables, arrays or Python floats, in any nesting.
        mode: `"reverse"`, one pullback for each output element; `"forward"`, one push for each input element; or
            `"auto"`, whichever are fewer.
        chunk_size: how many rows (columns) to compute at once; all by default. It bounds the memory and changes
            no value; each chunk evaluates `fun` anew where it is compiled.

    Returns:
        A function with the arguments of `fun` that returns the Jacobian: in the structure of what `fun` returns, each
        entry in the structure of the argument (a tuple of them for a tuple of positions), of shape `(*out, *in)`,
        zeros where nothing is connected.

    Raises:
        ValueError: for an unknown option; when called, if a position does not exist or an argument has no gradient.

    Cost:
        `min(out, in)` vectorized gradients, about two evaluations of `fun` each.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> polar = lambda r, t: ops.stack([r * ops.cos(t), r * ops.sin(t)])
    >>> by_r, by_t = kg.jacobian(polar, argnums=(0, 1))(2.0, 0.0)
    >>> [float(d) for d in by_r], [float(d) for d in by_t]
    ([1.0, 0.0], [0.0, 2.0])

    Source: Griewank & Walther, "Evaluating Derivatives" (2008), sections 3.1 and 3.2.
    """
    return _transformed("jacobian", fun, argnums, mode, chunk_size)


def batch_jacobian(fun, mode="auto", chunk_size=None, check_independence=False):
    r"""Turns a function of a batch into each example's Jacobian, $J_{b k i} = \partial f_{b k} / \partial x_{b i}$.

    It is right where the examples are independent of one another, which it does not see for itself and
    `check_independence` does, and costs one pullback of the whole batch for each element of *one* example's output. It
    is compiled and kept as `jacobian` is: of a model the weights of the moment are used, and nothing is traced again.

    Args:
        fun: a function or a Keras model of `(x, ...)`, with `x` of shape `(batch, ...)` or a nesting of such tensors,
            that returns tensors of shape `(batch, ...)`, in any nesting.
        mode: as for `jacobian`, counted in elements of one example.
        chunk_size: how many directions to compute at once, each for the whole batch; all by default. It bounds the
            memory and changes no value; each chunk evaluates `fun` anew where it is compiled.
        check_independence: whether each call first asks `kg.diagnostics.batch_independence`, eagerly, and raises an
            error with its report where the examples depend on one another.

    Returns:
        A function with the arguments of `fun` that returns its Jacobian by the first: in the structure of what `fun`
        returns, each entry in the structure of `x`, of shape `(batch, *out, *in)`.

    Raises:
        ValueError: for an unknown option; when called, if the batch sizes differ, a rank is below 2, or an argument
            has no gradient; with `check_independence`, if the examples depend on one another, and inside a compiled
            function.

    Cost:
        `min(out, in)` vectorized gradients of the whole batch, with `out` and `in` the sizes of one example: time
        and memory are linear in the number of examples. `check_independence` adds six gradients.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> x = ops.convert_to_tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> jacobian = kg.batch_jacobian(lambda x: x * x)(x)  # (2, 2, 2)
    >>> [[float(d) for d in row] for row in jacobian[1]]
    [[6.0, 0.0], [0.0, 8.0]]

    Source: TensorFlow's guide "Advanced automatic differentiation", section "Batch Jacobian".
    """
    transformed = _transformed("batch_jacobian", fun, 0, mode, chunk_size, batch_axes=1)
    validation.require_flag("batch_jacobian", "check_independence", check_independence)
    if not check_independence:
        return transformed

    @functools.wraps(fun, updated=())
    def checked(x, *args, **kwargs):
        report = examine("batch_jacobian", fun, x, args, kwargs)
        if report.independent is False:
            raise ValueError(f"batch_jacobian: {report}")
        return transformed(x, *args, **kwargs)

    return checked


def _transformed(name, fun, argnums, mode, chunk_size, batch_axes=0):
    require_function(name, fun)
    require_argnums(name, argnums)
    argnums = tuple(argnums) if isinstance(argnums, list) else argnums
    mode, chunk_size = jacobians.checked_mode(mode), jacobians.checked_chunk_size(chunk_size)
    return Jacobian(fun, Options(name, argnums, mode, chunk_size, batch_axes)).as_function()


class Options(NamedTuple):
    """What a Jacobian is computed with; a key."""

    name: str
    argnums: Any
    mode: str
    chunk_size: int | None
    batch_axes: int = 0
    of_gradient: bool = False


class Note(NamedTuple):
    """What is known of a Jacobian once its function was traced."""

    plan: jacobians.Plan
    target: Any
    sources: Any


class Jacobian:
    """One function's Jacobian (or its gradient's), compiled as a whole, or a chunk of it at a time."""

    def __init__(self, fun, options):
        self.fun = fun
        self.options = options

    def as_function(self):
        @functools.wraps(self.fun, updated=())
        def transformed(*args, **kwargs):
            if self.options.chunk_size is not None and compiled.may_run():
                return self._by_chunks(args, kwargs)
            return self._whole(args, kwargs)

        return transformed

    def _whole(self, args, kwargs):
        options = self.options
        body = functools.partial(_whole, options)
        return compiled.run(options.name, self.fun, body, ("whole", options), args, kwargs)[0]

    def _by_chunks(self, args, kwargs):
        """Calls one program for each chunk: inside one, a compiler might well hold all of them at once."""
        options = self.options
        size = options.chunk_size
        stacks, counts, part = [], [0], 0
        while part < len(counts):
            body = functools.partial(_chunk, options, part)
            index = np.arange(size, dtype="int32")
            key = ("chunk", part, options)
            compute = compiled.prepare(options.name, self.fun, body, key, (index, *args), kwargs)
            chunks, start = [], 0
            while start < max(counts[part], 1):
                rows, note = compute((start + index, *args), kwargs)
                if not note.plan.is_static:
                    return self._whole(args, kwargs)
                counts = note.plan.counts
                chunks.append(rows)
                start += size
            columns = zip(*chunks, strict=True)
            stacks.append([None if c[0] is None else ops.concatenate(c, axis=0)[: counts[part]] for c in columns])
            part += 1
        return _packed(note, note.plan.blocks(stacks, zero=True))


def _evaluated(options, fun, args, kwargs):
    fun = grad(fun, options.argnums) if options.of_gradient else fun
    call = TapedCall(options.name, fun, args, kwargs, options.argnums)
    targets, sources = call.flat_targets, call.flat_sources
    if options.batch_axes:
        for target in targets:
            for source in sources:
                jacobians.check_batch(options.name, target, source)
    plan = jacobians.Plan(targets, sources, options.mode, options.batch_axes)
    structures = (nesting.map_structure(lambda _: 0, x) for x in (call.target, call.sources))
    return call.record, targets, sources, Note(plan, *structures)


def _whole(options, fun, *args, **kwargs):
    tape, targets, sources, note = _evaluated(options, fun, args, kwargs)
    stacks = note.plan.stacks(tape, targets, sources, options.chunk_size)
    return _packed(note, note.plan.blocks(stacks, zero=True)), None


def _chunk(options, part, fun, index, *args, **kwargs):
    tape, targets, sources, note = _evaluated(options, fun, args, kwargs)
    return note.plan.stack(tape, targets, sources, part, index), note


def _packed(note, blocks):
    rows = [nesting.pack_as(note.sources, row) for row in blocks]
    return nesting.pack_as(note.target, rows)
