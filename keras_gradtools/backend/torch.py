"""The kernels on torch, built on autograd's graph.

torch has no tape: `torch_tape` makes one from autograd's graph, and `torch_graph` finds the nodes that a tape has
recorded. The other `torch_*` files correct operations that torch cannot differentiate twice. `keras_gradtools.backend`
lists what each kernel does.
"""

import contextlib
import functools
import itertools
import threading
import warnings

import keras
import torch

from keras_gradtools import nesting
from keras_gradtools.backend import (
    chunks,
    recording,
    torch_checkpoint,
    torch_fused,
    torch_graph,
    torch_keras_ops,
    torch_levels,
    torch_tape,
    torch_unfused,
)
from keras_gradtools.backend.blocks import Block
from keras_gradtools.backend.torch_containers import containers
from keras_gradtools.backend.torch_custom_gradient import custom_gradient
from keras_gradtools.backend.torch_tape import Tape
from keras_gradtools.keras_internals import backend_modules

__all__ = [
    "COMPILES_SECOND_ORDER",
    "HESSIAN_MODE",
    "LINEARIZES_ONCE",
    "Tape",
    "alias",
    "assigns_at_once",
    "can_make_variables",
    "compiled",
    "constant_pullback",
    "containers",
    "custom_gradient",
    "depends_on_values",
    "eagerly",
    "is_shared_by_replicas",
    "jit",
    "linearize",
    "map_chunks",
    "may_compile",
    "modes_kept",
    "per_example_gradients",
    "pullback",
    "pullback_batch",
    "pushforward",
    "pushforward_batch",
    "random_state",
    "replica_results",
    "settled",
    "spread",
    "summed_over_processes",
    "summed_over_replicas",
    "train_function",
    "tried",
    "with_random_state",
]

# What `torch.compile` has compiled can only be differentiated once.
COMPILES_SECOND_ORDER = False
HESSIAN_MODE = "reverse"
LINEARIZES_ONCE = True

get_device = backend_modules.function("core", "get_device")

torch_tape.install()
torch_checkpoint.install()
torch_fused.install()
torch_keras_ops.install()


def pullback(tape, targets, sources, cotangents):
    run = _run if tape.keeps_graph else _run_last
    return tape.gather(sources, lambda values: _pull(tape, targets, values, cotangents, run))


def constant_pullback(tape, targets, sources, cotangents):
    block = torch_graph.GradMode(False)
    with block, block:
        return pullback(tape, targets, sources, cotangents)


def pullback_batch(tape, targets, sources, cotangents):
    return tape.gather(sources, lambda values: _pull(tape, targets, values, cotangents, _run_batch))


def _pull(tape, targets, sources, cotangents, run, is_recorded=None):
    return _Pullback(tape, targets, sources)(cotangents, run, is_recorded)


class _Pullback:
    """The pullback of a tape, as a function of cotangents. The part of the graph that it needs is found only once."""

    def __init__(self, tape, targets, sources):
        if get_device() == "meta":
            # Keras first infers shapes on the device "meta", where it cuts the graph at every operation, so connected
            # tensors would seem unconnected. After an error, it infers the shapes again with values.
            raise RuntimeError(
                "A GradientTape cannot differentiate on the device 'meta', where Keras cuts the graph. Received: "
                "a call inside `keras.device('meta')`. Use a device that has memory."
            )
        torch_levels.check(targets, sources)
        self._tape, self._targets, self._sources = tape, targets, sources
        self._target_edges, self._source_edges = tape.edges(targets, sources)
        self._wanted = list({edge: None for edge in self._source_edges if edge is not None})
        outputs = [edge for edge in self._target_edges if edge is not None]
        self._part = tape.slice(outputs) if outputs and self._wanted else None
        self._outputs = _native(outputs)

    def __call__(self, cotangents, run, is_recorded=None):
        gradients = {}
        if self._part is not None:
            if is_recorded is None:
                is_recorded = _is_recorded(self._part, cotangents)
            upstream = tuple(u for edge, u in zip(self._target_edges, cotangents, strict=True) if edge is not None)
            block = torch_graph.passing(self._part, is_recorded)
            with block, block:
                given = run(self._outputs, _native(self._wanted), upstream, is_recorded)
            gradients = dict(zip(self._wanted, map(_dense, given), strict=True))
        results = [gradients.get(edge) for edge in self._source_edges]
        for i, source in enumerate(self._sources):
            for target, edge, u in zip(self._targets, self._target_edges, cotangents, strict=True):
                # The derivative of a target by itself, even if this tape does not follow it.
                if target is source and (edge is None or self._source_edges[i] is None):
                    results[i] = u if results[i] is None else results[i] + u
            if results[i] is None:
                self._tape.require_unchanged(source)
        return results


def _dense(gradient):
    # torch may return zero tensors without memory, which `numpy()` cannot read. A clone is an ordinary tensor.
    return gradient.clone() if gradient is not None and gradient._is_zerotensor() else gradient


def _native(edges):
    return [torch.autograd.graph.GradientEdge(*edge) for edge in edges]


def _is_recorded(part, given):
    """Whether a result may be differentiated again, by another tape, or by torch itself outside of all tapes.

    If tensors require gradients only because of tapes, it cannot be. Then the result must not require gradients,
    because torch refuses to convert a tensor that does to a NumPy array.
    """
    return _may_be_recorded(lambda: part.is_used_outside() or torch_graph.is_used_outside(_nodes(given)))


def _may_be_recorded(is_used_outside):
    if not torch.is_grad_enabled():
        return False
    if recording.active_tapes():
        return True
    return torch_tape.grad_mode_outside() and is_used_outside()


def _nodes(tensors):
    return [torch.autograd.graph.get_gradient_edge(t).node for t in tensors if t.requires_grad]


def _run(outputs, inputs, upstream, is_recorded):
    return torch.autograd.grad(
        outputs, inputs, upstream, retain_graph=True, create_graph=is_recorded, allow_unused=True
    )


def _run_last(outputs, inputs, upstream, is_recorded):
    # Freeing the graph during the pass saves time, because the memory is used again.
    return torch.autograd.grad(
        outputs, inputs, upstream, retain_graph=is_recorded, create_graph=is_recorded, allow_unused=True
    )


def _run_batch(outputs, inputs, upstream, is_recorded):
    if len(upstream[0]) == 1 or torch_levels.depth():
        # One row needs no vectorization. Inside a transform of `torch.func`, the results would be batched tensors of
        # the vectorized pass, wrapped in tensors of that transform.
        return _run_rows(outputs, inputs, upstream, is_recorded)
    try:
        # Not by `torch.vmap` or `torch.func`, which fail on convolutions in the channels-last layout.
        vectorized = torch_levels.VectorizedPass()
        with vectorized, vectorized:
            return torch.autograd.grad(
                outputs,
                inputs,
                upstream,
                retain_graph=True,
                create_graph=is_recorded,
                allow_unused=True,
                is_grads_batched=True,
            )
    except RuntimeError as error:
        rows = _run_rows(outputs, inputs, upstream, is_recorded)
        _warn_unvectorized(str(error).splitlines()[0])
        return rows


def _run_rows(outputs, inputs, upstream, is_recorded):
    rows = [_run(outputs, inputs, row, is_recorded) for row in zip(*upstream, strict=True)]
    return [None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)]


@functools.cache
def _warn_unvectorized(reason):
    warnings.warn(
        "torch cannot vectorize this computation. Jacobians are computed one row at a time, and per-example gradients "
        f"one example at a time, which is slower. torch said: {reason}",
        stacklevel=2,
    )


def pushforward(tape, targets, sources, tangents):
    return _Linear(tape, targets, sources).push(tangents, _run)


def pushforward_batch(tape, targets, sources, tangents):
    return _Linear(tape, targets, sources).push(tangents, _run_batch)


def linearize(tape, targets, sources, is_symmetric=False):
    if is_symmetric:
        # For a symmetric matrix, the pullback is the pushforward, which would need a second pullback.
        _, values, _ = tape.spread(sources, sources)
        pull = _Pullback(tape, targets, values)
        return lambda tangents: tape.gather(sources, lambda _: pull(tangents, _run))
    linear = _Linear(tape, targets, sources)
    return lambda tangents: linear.push(tangents, _run)


# NaN entries of a tangent are computed again only if there are at most this many. Each needs a row of the Jacobian.
_MOST_ROWS = 1024


def _has_nan(x):
    try:
        return bool(torch.isnan(x).any())
    except RuntimeError:
        return False  # a tensor without values, while it is traced


class _Linear:
    """The pushforward of a tape, as a function of tangents.

    A pullback is linear in its cotangents, so its own pullback is the pushforward. torch's forward mode cannot be used,
    because it would have to be active while the block runs.
    """

    def __init__(self, tape, targets, sources):
        self._targets = len(targets)
        _, values, places = tape.spread(sources, range(len(sources)))
        self._outputs, self._places = targets, places
        self._pullback = _Pullback(tape, targets, values)
        self._cotangents = [torch.zeros_like(t) for t in targets]
        block = torch_graph.Borrowing(self._cotangents)
        with block, block:
            gradients = self._pullback(self._cotangents, _run, is_recorded=True)
            self._connected = [
                (g, place) for g, place in zip(gradients, places, strict=True) if g is not None and g.requires_grad
            ]

    def push(self, tangents, run):
        if not self._connected:
            return [None] * self._targets
        gradients = [g for g, _ in self._connected]
        along = [tangents[place] for _, place in self._connected]
        block = torch_graph.Borrowing(self._cotangents)
        with block, block:
            part = torch_graph.Slice([(node, 0) for node in _nodes(gradients)], lambda number: False, {})
            is_recorded = _is_recorded(part, along)
            part.boundaries = []
            one_pass = torch_graph.passing(part, is_recorded)
            with one_pass, one_pass:
                pushed = [_dense(p) for p in run(gradients, self._cotangents, along, is_recorded)]
        return [self._mended(i, p, tangents, run) if p is not None and _has_nan(p) else p for i, p in enumerate(pushed)]

    def _mended(self, target, pushed, tangents, run):
        """Replaces the NaN entries in the tangent of one target by entries from rows of the Jacobian.

        Where the gradient of an operation is singular but does not matter (`std` of equal numbers), torch masks it. The
        pullback of that gradient meets the masked infinity and gives NaN. A row of the Jacobian, a single pullback,
        does not.
        """
        output = self._outputs[target]
        is_stack = run is _run_batch
        missing = torch.isnan(pushed).reshape(-1, output.numel()).any(0).nonzero()[:, 0]
        if len(missing) > _MOST_ROWS:
            return pushed
        units = torch.nn.functional.one_hot(missing, output.numel()).to(output.dtype).reshape(-1, *output.shape)
        cotangents = [output.new_zeros((len(missing), *output.shape)) for output in self._outputs]
        cotangents[target] = units
        pulled = self._pullback(cotangents, _run_batch)
        found = 0
        for rows, place in zip(pulled, self._places, strict=True):
            if rows is not None:
                v = tangents[place].reshape(len(pushed) if is_stack else 1, -1)
                found = found + v @ rows.reshape(len(missing), -1).transpose(0, 1)
        flat = pushed.reshape(-1, output.numel())
        mended = flat.index_copy(1, missing, torch.where(torch.isnan(flat[:, missing]), found, flat[:, missing]))
        return mended.reshape(pushed.shape)


def alias(x):
    # Without grad mode, the alias of a tensor that requires gradients would not be connected to it.
    if torch.is_grad_enabled():
        return x.view_as(x)
    block = torch_graph.GradMode(True)
    with block, block:
        return x.view_as(x)


def settled(tensors):
    attached = [t for t in tensors if t.requires_grad]
    if not attached or _may_be_recorded(lambda: torch_graph.is_used_outside(_nodes(attached))):
        return tensors
    return [t.detach() if t.requires_grad else t for t in tensors]


def spread(x):
    return x


def summed_over_replicas(fun, batch, variable):
    return fun(batch)


def is_shared_by_replicas(batch, variable):
    return False


def replica_results(fun, batch, variable):
    return [fun(batch)]


def train_function(model, step):
    def function(data):
        # `data` is a list of `steps_per_execution` batches, or fewer at the end of an epoch.
        for batch in data:
            logs = step(batch)
        return logs

    return function


def summed_over_processes(totals, count):
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return totals, count
    # Imported here because the import is slow.
    from torch.distributed.tensor import DTensor

    if any(isinstance(total, DTensor) for total in totals):
        raise RuntimeError(
            "Sums over processes need weights that each process holds as a whole. Received: weights that are split "
            "between processes (`keras.distribution.ModelParallel`). Use `keras.distribution.DataParallel`, or one "
            "process."
        )
    totals = [torch.as_tensor(total, device=get_device()).contiguous().clone() for total in totals]
    count = torch.tensor(count, dtype=torch.int64, device=totals[0].device)
    for x in (*totals, count):
        distributed.all_reduce(x)
    return totals, int(count)


def random_state():
    # Torch modules, and Keras' dropout without a seed, draw from torch's own generators.
    on_device = torch.cuda.get_rng_state() if get_device().startswith("cuda") else None
    return torch.get_rng_state(), on_device


class with_random_state(Block):  # noqa: N801 - said of a block
    """A block in which torch's random generators have a given state. Afterwards they have their former state."""

    # All threads share the generators.
    _lock = threading.RLock()

    def __init__(self, state):
        self._state, self._before = state, None
        self._taken: list = []
        self._given: list = []

    def begin(self):
        # `extend` with `map` runs in C, so an interrupt cannot come between the change of the lock and its note.
        self._taken.extend(map(self._lock.acquire, (True,)))
        self._before = random_state()
        _set_random_state(self._state)

    def end(self):
        if self._before is not None:
            _set_random_state(self._before)
        if len(self._given) < len(self._taken):
            self._given.extend(itertools.starmap(self._lock.release, ((),)))


def _set_random_state(state):
    on_host, on_device = state
    torch.set_rng_state(on_host)
    if on_device is not None:
        torch.cuda.set_rng_state(on_device)


def assigns_at_once():
    return True


def can_make_variables():
    return True


def eagerly():
    return contextlib.nullcontext()


def tried(fun):
    fun()


def modes_kept():
    return torch_graph.GradMode(torch.is_grad_enabled())


def may_compile():
    return False


def depends_on_values(error):
    return False


def map_chunks(fun, count, chunk_size):
    return chunks.loop(fun, count, chunk_size)


def per_example_gradients(fun, weights, examples, must_vectorize=False):
    # A tape cannot record inside `torch.vmap`, so the gradient is that of `torch.func`.
    mapped = torch.vmap(torch.func.grad(fun, has_aux=True), in_dims=(None, 0), randomness="same")
    try:
        if not _may_be_recorded(lambda: any(x.requires_grad for x in (*weights, *examples))):
            found = mapped(weights, examples)
            if not any(x.requires_grad for part in found for x in part):
                return found
        with torch_unfused.Unfused():
            return mapped(weights, examples)
    except (RuntimeError, AttributeError) as error:
        if must_vectorize:
            raise
        rows = [_gradients(fun, weights, [x[i] for x in examples]) for i in range(len(examples[0]))]
        _warn_unvectorized(str(error).strip().splitlines()[0])
        return tuple([torch.stack(column) for column in zip(*part, strict=True)] for part in zip(*rows, strict=True))


def _gradients(fun, weights, example):
    tape = Tape(watch_accessed_variables=False)
    with tape, tape:
        for w in weights:
            tape.watch(w)
        value, aux = fun(weights, example)
    gradients = pullback(tape, [value], weights, [torch.ones_like(value)])
    return [torch.zeros_like(w) if g is None else g for g, w in zip(gradients, weights, strict=True)], aux


def compiled(fun):
    function = torch.compile(fun)

    @functools.wraps(fun)
    def call(*args, **kwargs):
        # Donated buffers allow only one backward pass, but a directional derivative takes one, and the gradient of the
        # weights another one.
        with torch._functorch.config.patch(donated_buffer=False):
            return function(*args, **kwargs)

    return call


def jit(fun):
    """Runs `fun` uncompiled, because `torch.compile` does not support second derivatives."""

    @functools.wraps(fun)
    def call(*args, **kwargs):
        return fun(*_floats_to_tensors(args), **_floats_to_tensors(kwargs))

    return call


def _floats_to_tensors(structure):
    # `kg.jit` on the other backends passes floats to `fun` as tensors, too.
    return nesting.map_structure(
        lambda x: keras.ops.convert_to_tensor(x, keras.config.floatx()) if isinstance(x, float) else x, structure
    )
