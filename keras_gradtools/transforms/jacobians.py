"""Jacobians of functions and models: full Jacobians and per-example Jacobians."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from keras import ops

from keras_gradtools import backend, chosen_inputs, memory, nesting, validation
from keras_gradtools.annotations import Arguments, ChunkSize, InputNames
from keras_gradtools.independence.example_mixing import examine
from keras_gradtools.tape import jacobian_plans, vectors
from keras_gradtools.transforms import auxiliary, compiled
from keras_gradtools.transforms.repeated_calls import RepeatedCalls
from keras_gradtools.transforms.taped_call import (
    TapedCall,
    argument_positions,
    is_scalar,
    require_argnums,
    require_function,
)
from keras_gradtools.transforms.taylor.kinks import Judgement


def jacobian(
    fun: Callable[Arguments, Any],
    argnums: int | Sequence[int] = 0,
    mode: Literal["auto", "forward", "reverse"] = "auto",
    chunk_size: ChunkSize = None,
    has_aux: bool = False,
    memory_budget: int | None = None,
) -> Callable[Arguments, Any]:
    r"""Turns a function into its Jacobian, $J_{k i} = \partial f_k / \partial x_i$.

    An eager call is compiled. The compiled program is cached for the same `fun`, shapes and dtypes, and the Python code
    of `fun` does not run again. The Keras variables that `fun` reads always have their current values. If another
    captured value changes, `fun` is traced again. `kg.jit` describes which changes are seen. (None of this concerns
    `kg.GradientTape`.) If the Python code of `fun` depends on the values of tensors, it runs eagerly, with a warning.
    On torch the first two calls are recorded, as by `kg.jit`. Assignments to variables inside `fun` are discarded.

    Args:
        fun: A function that returns real floating-point tensors in any nested structure.
        argnums: The position of the argument to differentiate with respect to, or a tuple of positions. These
            arguments are real floating-point tensors, variables, arrays or Python floats, in any nested structure.
        mode: `"reverse"` (one cotangent per output element), `"forward"` (one tangent per input element), or `"auto"`
            (whichever needs fewer directions).
        chunk_size: Number of rows (or columns) to compute at once. By default all. Smaller chunks need less memory. The
            result is the same. In a compiled Jacobian every chunk evaluates `fun` again. With `"auto"`, as many as fit
            into `memory_budget`.
        has_aux: Whether `fun` returns a pair `(out, aux)`. `aux` is any nested structure of tensors and other values.
            Values that are not tensors are those of the last time the Python code of `fun` ran.
        memory_budget: The number of bytes that a chunk may take, besides the result, with `chunk_size="auto"`. By
            default a quarter of the memory that is free at the first call. At least one row is computed at once. The
            memory of a row is estimated from above, as twice the size of all tensors that `fun` computes.

    Returns:
        A function with the arguments of `fun` that returns the Jacobian, or `(jacobian, aux)` with `has_aux`. The
        Jacobian has the structure of the output of `fun`, in which each entry has the structure of the argument (a
        tuple of such structures for a tuple of positions). Its leaves have the shape `(*out, *in)` and the dtype of the
        argument, with zeros where the output does not depend on the argument.

    Raises:
        ValueError: For an unknown option. When called, if a position does not exist or an argument cannot have a
            gradient.

    Cost:
        `min(out, in)` vectorized gradients of about two evaluations of `fun` each.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> polar = lambda r, t: ops.stack([r * ops.cos(t), r * ops.sin(t)])
    >>> by_r, by_t = kg.jacobian(polar, argnums=(0, 1))(2.0, 0.0)
    >>> [float(d) for d in by_r], [float(d) for d in by_t]
    ([1.0, 0.0], [0.0, 2.0])

    Source: Griewank & Walther, "Evaluating Derivatives" (2008), sections 3.1 and 3.2.
    """
    require_function("jacobian", fun)
    return Jacobian(fun, _options("jacobian", argnums, mode, chunk_size, has_aux, memory_budget)).as_function()


def batch_jacobian(
    fun: Callable[Arguments, Any],
    mode: Literal["auto", "forward", "reverse"] = "auto",
    chunk_size: ChunkSize = None,
    check_independence: bool = False,
    inputs: InputNames = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    memory_budget: int | None = None,
) -> Callable[Arguments, Any]:
    r"""Turns a function of a batch into each example's Jacobian, $J_{b k i} = \partial f_{b k} / \partial x_{b i}$.

    Correct only if the examples are independent. This is not checked unless `check_independence=True`. It costs at most
    one backward pass of the whole batch per element of *one* example's output. It is compiled and cached as for
    `jacobian`. A model's current weights are used without tracing again.

    Args:
        fun: A function or a Keras model that returns tensors of shape `(batch, ...)` in any nested structure.
        mode: As for `jacobian`, counting the elements of one example.
        chunk_size: Number of directions to compute at once, each for the whole batch. By default all. Smaller chunks
            need less memory. The result is the same. In a compiled Jacobian every chunk evaluates `fun` again. With
            `"auto"`, as many as fit into `memory_budget`.
        check_independence: Whether each call first runs `kg.diagnostics.batch_independence` eagerly, and raises an
            error with its report if the examples depend on one another.
        inputs: The name (dict key or name of a model input) or position of the inputs to differentiate with respect to
            within the argument, or a list of these. By default all floating-point inputs. All other inputs, such as
            integers and masks, are passed on unchanged.
        argnums: The position of the argument to differentiate with respect to, or a tuple of positions. These
            arguments are tensors of shape `(batch, ...)` in any nested structure.
        has_aux: As for `jacobian`.
        memory_budget: As for `jacobian`.

    Returns:
        A function with the arguments of `fun` that returns the Jacobian, or `(jacobian, aux)` with `has_aux`. The
        Jacobian has the structure of the output of `fun`, in which each entry has the structure of the argument (a
        tuple of such structures for a tuple of positions). Its leaves have the shape `(batch, *out, *in)`, with zeros
        where the output does not depend on the input. Inputs that are not differentiated get None.

    Raises:
        ValueError: For an unknown option. When called, if the batch sizes differ, a rank is below 2, or no input can
            have a gradient. With `check_independence`, if the examples depend on one another, or if called inside a
            compiled function.

    Cost:
        `min(out, in)` vectorized gradients of the whole batch, where `out` and `in` are the sizes of one example. Time
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
    name = "batch_jacobian"
    require_function(name, fun)
    jacobian_plans.require_mode(name, mode, f"`{name}` returns a function of the arguments: `{name}(fun)(x)`.")
    options = _options(name, argnums, mode, chunk_size, has_aux, memory_budget, batch_axes=1)
    validation.require_flag(name, "check_independence", check_independence)
    names = chosen_inputs.require_names(name, inputs)
    if names is None and not check_independence:
        return Jacobian(fun, options).as_function()

    @functools.wraps(fun, updated=())
    def transformed(*args, **kwargs):
        x = _picked(name, args, options.argnums)
        chosen = None if names is None else chosen_inputs.choose(name, fun, x, names)
        if check_independence:
            _require_independence(fun, options, args, kwargs, chosen)
        return Jacobian(fun, options._replace(chosen=chosen))(*args, **kwargs)

    return transformed


def _require_independence(fun, options, args, kwargs, chosen):
    def of_picked(x, **kwargs):
        returned = fun(*_placed(options.name, args, options.argnums, x), **kwargs)
        return auxiliary.split(options.name, returned)[0] if options.has_aux else returned

    x = _picked(options.name, args, options.argnums)
    if options.argnums == 0 and not options.has_aux:
        report = examine(options.name, fun, x, args[1:], kwargs, chosen=chosen)
    else:
        report = examine(options.name, functools.wraps(fun, updated=())(of_picked), x, (), kwargs, chosen=chosen)
    if report.independent is False:
        raise ValueError(f"{options.name}: {report}")


def _picked(name, args, argnums):
    """The argument to differentiate with respect to, or a tuple of arguments if `argnums` is a tuple."""
    chosen = tuple(args[i] for i in argument_positions(name, argnums, len(args)))
    return chosen if isinstance(argnums, tuple) else chosen[0]


def _placed(name, args, argnums, x):
    """The arguments, with those at `argnums` replaced by `x`."""
    args = list(args)
    positions = argument_positions(name, argnums, len(args))
    for i, value in zip(positions, x if isinstance(argnums, tuple) else [x], strict=True):
        args[i] = value
    return args


def _options(name, argnums, mode, chunk_size, has_aux, memory_budget, **others):
    require_argnums(name, argnums)
    argnums = tuple(argnums) if isinstance(argnums, list) else argnums
    mode = jacobian_plans.require_mode(name, mode)
    chunk_size, memory_budget = require_rows(name, chunk_size, memory_budget)
    has_aux = validation.require_flag(name, "has_aux", has_aux)
    return Options(name, argnums, mode, chunk_size, has_aux, memory_budget, **others)


def require_rows(name, chunk_size, memory_budget):
    """Returns `chunk_size` and `memory_budget`. Raises `ValueError` if one is wrong, or if both are numbers."""
    chunk_size = jacobian_plans.require_chunk_size(name, chunk_size, may_be_auto=True)
    memory_budget = validation.require_count(name, "memory_budget", memory_budget, may_be_none=True)
    if memory_budget is None:
        return chunk_size, None
    if isinstance(chunk_size, int):
        advice = "A memory budget chooses the number of rows: give one of them."
        raise validation.refused(name, '"auto" or None beside a `memory_budget`', "chunk_size", chunk_size, advice)
    return "auto", memory_budget


class Options(NamedTuple):
    """The options of a Jacobian. Hashable, so that it can be part of a cache key."""

    name: str
    argnums: Any
    mode: str
    chunk_size: ChunkSize
    has_aux: bool = False
    memory_budget: int | None = None
    batch_axes: int = 0
    of_derivative: bool = False
    chosen: chosen_inputs.ChosenInputs | None = None


class Note(NamedTuple):
    """What Python knows about a Jacobian once its function has been traced."""

    plan: jacobian_plans.Plan
    target: nesting.Places
    sources: nesting.Places
    aux: Any


class Jacobian:
    """The Jacobian of a function or of its derivative, compiled as a whole or one program per chunk."""

    def __init__(self, fun, options):
        self.fun = fun
        self.options = options
        self._body = functools.partial(_whole, options)
        self._key = ("whole", options)
        self._calls = RepeatedCalls(options.name, fun)

    def as_function(self):
        @functools.wraps(self.fun, updated=())
        def transformed(*args, **kwargs):
            return self(*args, **kwargs)

        return transformed

    def __call__(self, *args, **kwargs):
        if self.options.chunk_size == "auto":
            options = self.options._replace(chunk_size=self._rows_that_fit(args, kwargs), memory_budget=None)
            return Jacobian(self.fun, options)(*args, **kwargs)
        if self.options.chunk_size is not None and compiled.may_run():
            return self._by_chunks(args, kwargs)
        return self._whole(args, kwargs)

    def _rows_that_fit(self, args, kwargs):
        options = self.options

        def find():
            plans = []

            def evaluated():
                _, targets, _, _, note = _evaluated(options, self.fun, args, kwargs)
                plans.append(note.plan)
                return targets

            computed = backend.computed_bytes(evaluated)
            plan = plans[-1]
            return plan.rows_within(options.memory_budget or memory.budget(), computed) if plan.is_static else None

        return compiled.remembered(options.name, self.fun, ("rows", options), args, kwargs, find)

    def _whole(self, args, kwargs):
        (blocks, aux), note = self._calls.run(self._body, self._key, args, kwargs)
        return self._with_aux(blocks, aux, note)

    def _with_aux(self, blocks, aux, note):
        return (blocks, auxiliary.put_together(aux, note.aux)) if self.options.has_aux else blocks

    def _by_chunks(self, args, kwargs):
        """Runs a separate program for each chunk. In a single program, the compiler might keep all chunks in memory."""
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
                (rows, aux), note = compute((start + index, *args), kwargs)
                if not note.plan.is_static:
                    return self._whole(args, kwargs)
                counts = note.plan.counts
                chunks.append(rows)
                start += size
            columns = zip(*chunks, strict=True)
            stacks.append([None if c[0] is None else ops.concatenate(c, axis=0)[: counts[part]] for c in columns])
            part += 1
        return self._with_aux(_packed(note, note.plan.blocks(stacks, zero=True)), aux, note)


def _evaluated(options, fun, args, kwargs):
    fun = _derivative(options, fun) if options.of_derivative else fun
    call, by = _called(options, fun, args, kwargs)
    targets, sources = call.flat_targets, call.flat_sources
    if options.batch_axes:
        for target in targets:
            for source in sources:
                jacobian_plans.require_same_batch(options.name, target, source)
    plan = jacobian_plans.Plan(targets, sources, options.mode, options.batch_axes)
    aux, rest = auxiliary.take_apart(call.aux)
    return call.tape, targets, sources, aux, Note(plan, vectors.places(call.target), by, rest)


def _called(options, fun, args, kwargs):
    """The recorded call, and the places of the leaves to differentiate with respect to."""
    argnums, chosen = options.argnums, options.chosen
    if chosen is None:
        call = TapedCall(options.name, fun, args, kwargs, argnums, options.has_aux)
        return call, vectors.places(call.sources)
    x = _picked(options.name, args, argnums)
    of_chosen = chosen.function(lambda x, **kwargs: fun(*_placed(options.name, args, argnums, x), **kwargs), x)
    return TapedCall(options.name, of_chosen, (chosen.parts(x),), kwargs, 0, options.has_aux), chosen.places(x)


def _derivative(options, fun):
    """The derivative of `fun` as a function: the gradient if `fun` is scalar, otherwise the Jacobian."""

    def derivative(*args, **kwargs):
        judgement = Judgement(options.name, fun, options.argnums)
        call = TapedCall(options.name, fun, args, kwargs, options.argnums, options.has_aux, judgement.operations)
        judgement.warn_if_piecewise_linear(call)
        if is_scalar(call.target):
            found = call.vjp(is_last=True)
        else:
            blocks = jacobian_plans.jacobians(call.tape, call.flat_targets, call.flat_sources, "auto", None, zero=True)
            found = vectors.pack_as(call.target, [vectors.pack_as(call.sources, row) for row in blocks])
        return (found, call.aux) if options.has_aux else found

    return derivative


def _whole(options, fun, *args, **kwargs):
    tape, targets, sources, aux, note = _evaluated(options, fun, args, kwargs)
    stacks = note.plan.stacks(tape, targets, sources, options.chunk_size)
    return (_packed(note, note.plan.blocks(stacks, zero=True)), aux), note


def _chunk(options, part, fun, index, *args, **kwargs):
    tape, targets, sources, aux, note = _evaluated(options, fun, args, kwargs)
    return (note.plan.stack(tape, targets, sources, part, index), aux), note


def _packed(note, blocks):
    return note.target.pack([note.sources.pack(row) for row in blocks])
