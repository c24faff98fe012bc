"""Differentiates the operations that a JAX tape has recorded, in reverse or forward mode.

A `Slice` holds the operations between the sources and the targets. A sweep over it lets JAX differentiate each one at
its recorded inputs, and chains the results. The user's function does not run again: an enclosing derivative would also
differentiate that second run.

Run eagerly, one operation at a time, a sweep is slower than the recorded block. So from the second time that the same
structure occurs, it is compiled, with all arrays as arguments. Inside `jax.jit`, the enclosing program compiles it.
"""

import collections
import threading
import types
import typing
import weakref

import jax
from jax._src.array import ArrayImpl
from jax._src.linear_util import WrappedFun
from jax.extend.core import ClosedJaxpr

from keras_gradtools.backend import jax_operation, jax_programs, jax_trace


class Step(typing.NamedTuple):
    """An operation of a slice. Inputs and outputs are slots. Derivatives pass through the `active` positions."""

    operation: jax_operation.Operation
    inputs: tuple
    outputs: tuple
    active_inputs: tuple
    active_outputs: tuple

    def split(self, arrays):
        """Returns a function from the active inputs of the operation to its active outputs, and these inputs."""
        values = [arrays[slot] for slot in self.inputs]

        def fun(*active):
            for position, x in zip(self.active_inputs, active, strict=True):
                values[position] = x
            outputs = self.operation.bind(values)
            return [outputs[position] for position in self.active_outputs]

        return fun, [values[position] for position in self.active_inputs]


class Slice:
    """The recorded operations through which `targets` depend on `sources`.

    Every value has a number, its slot. The distinct sources come first, then all other inputs and outputs of the
    operations. `arrays` maps the slots that are read to their recorded values.
    """

    def __init__(self, tape, targets, sources):
        source_ids = {id(s) for s in sources if id(s) in tape.followed}
        operations = _between(tape.operations, source_ids, targets)
        read = {id(x) for operation in operations for x in operation.differentiable} | {id(t) for t in targets}
        self.inputs = list({id(s): s for s in sources if id(s) in source_ids and id(s) in read}.values())
        slots = {id(x): slot for slot, x in enumerate(self.inputs)}
        self.source_slots = [slots.get(id(s)) for s in sources]

        active = set(slots)
        self.arrays = dict(enumerate(self.inputs))
        self.steps = []
        for operation in operations:
            for x in operation.inputs:
                slot = slots.setdefault(id(x), len(slots))
                self.arrays[slot] = x
            active_inputs = tuple(i for i, x in enumerate(operation.differentiable) if id(x) in active)
            active_outputs = tuple(i for i, x in enumerate(operation.outputs) if jax_trace.is_followable(x))
            active.update(id(operation.outputs[i]) for i in active_outputs)
            for x in operation.outputs:
                slots.setdefault(id(x), len(slots))
            ins = tuple(slots[id(x)] for x in operation.inputs)
            outs = tuple(slots[id(x)] for x in operation.outputs)
            self.steps.append(Step(operation, ins, outs, active_inputs, active_outputs))
        self.target_slots = [slots[id(t)] if id(t) in active else None for t in targets]

    def structure(self):
        """A hashable key of everything except the arrays. Raises `TypeError` if some parameter cannot be hashed."""
        steps = tuple((*_weak_operation(step.operation), *step[1:]) for step in self.steps)
        key = (steps, len(self.inputs), tuple(self.target_slots))
        hash(key)
        return key


def _between(operations, source_ids, targets):
    """The operations that lie on a path from a source to a target."""
    reached = set(source_ids)
    forward = []
    for operation in operations:
        if any(id(x) in reached for x in operation.differentiable):
            forward.append(operation)
            reached.update(id(x) for x in operation.outputs if jax_trace.is_followable(x))
    needed = {id(t) for t in targets if id(t) in reached}
    backward = []
    for operation in reversed(forward):
        if any(id(x) in needed for x in operation.outputs):
            backward.append(operation)
            needed.update(id(x) for x in operation.differentiable if id(x) in reached)
    return backward[::-1]


def pull(part, arrays, cotangents):
    """Reverse mode: the gradient of each input of the slice."""
    sums = {}
    add(sums, (slot for slot in part.target_slots if slot is not None), cotangents)
    for step in reversed(part.steps):
        if not any(step.outputs[i] in sums for i in step.active_outputs):
            continue
        outputs = [(step.outputs[i], step.operation.outputs[i]) for i in step.active_outputs]
        fun, inputs = step.split(arrays)
        _, pullback = jax.vjp(fun, *inputs)
        gradients = pullback([sums[slot] if slot in sums else jax.numpy.zeros_like(x) for slot, x in outputs])
        add(sums, (step.inputs[i] for i in step.active_inputs), gradients)
    return [sums[slot] for slot in range(len(part.inputs))]


def pull_batch(part, arrays, cotangents):
    return _by_pieces(lambda rows: pull(part, arrays, rows), part, cotangents)


def push(part, arrays, tangents):
    """Forward mode: the derivative of each connected target."""
    sums = dict(enumerate(tangents))
    for step in part.steps:
        fun, inputs = step.split(arrays)
        slots = [step.inputs[i] for i in step.active_inputs]
        directions = [sums[slot] if slot in sums else jax.numpy.zeros_like(arrays[slot]) for slot in slots]
        add(sums, (step.outputs[i] for i in step.active_outputs), _push_one(step.operation, fun, inputs, directions))
    return [sums[slot] for slot in part.target_slots if slot is not None]


def push_batch(part, arrays, tangents):
    return _by_pieces(lambda rows: push(part, arrays, rows), part, tangents)


# On a CPU, the values of a sweep should fit into its caches: on a convolutional network, ten rows of 8 MiB each took
# 1.8 times as long at once as one by one. Small rows are slower in pieces, and many pieces take long to compile.
PIECE_BYTES = 2**24
LEAST_BYTES = 2**20
MOST_PIECES = 16


def _by_pieces(sweep, part, stacks):
    """Maps `sweep` over axis 0 of `stacks`, vectorized. On a CPU, large stacks are split into pieces for its caches."""
    count = step = stacks[0].shape[0]
    outputs = (step.operation.outputs[i] for step in part.steps for i in step.active_outputs)
    row_bytes = sum(x.size * x.dtype.itemsize for x in outputs)
    if row_bytes >= LEAST_BYTES and jax.default_backend() == "cpu":
        step = max(PIECE_BYTES // row_bytes, -(-count // MOST_PIECES))
    if step >= count:
        return jax.vmap(sweep)(stacks)
    pieces = [jax.vmap(sweep)([s[i : i + step] for s in stacks]) for i in range(0, count, step)]
    return [jax.numpy.concatenate(column) for column in zip(*pieces, strict=True)]


def _push_one(operation, fun, inputs, directions):
    if not jax_programs.lacks_forward_mode(operation.primitive, operation.params):
        return jax.jvp(fun, inputs, directions)[1]
    # `custom_vjp` and similar operations have no forward mode. Their pullback is linear, so its own pullback is one.
    outputs, pullback = jax.vjp(fun, *inputs)
    _, push = jax.vjp(pullback, [jax.numpy.zeros_like(x) for x in outputs])
    return push(tuple(directions))[0]


def add(sums, slots, values):
    for slot, value in zip(slots, values, strict=True):
        sums[slot] = sums[slot] + value if slot in sums else value


def differentiate(mode, part, vectors):
    """Runs `mode`, such as `pull` or `push`, on a slice, compiled if the same structure has occurred before."""
    try:
        if not part.steps or jax_trace.is_traced([*part.arrays.values(), *vectors]):
            return mode(part, part.arrays, vectors)
        return compiled_sweeps.run(mode, part, part.arrays, vectors)
    except (RuntimeError, ValueError) as error:
        raise_if_deleted(part, error)
        raise


def raise_if_deleted(part, error):
    """Raises a clearer error if a recorded array was deleted, which then caused `error`."""
    gone = [x for x in part.arrays.values() if isinstance(x, ArrayImpl) and x.is_deleted()]
    if gone:
        raise RuntimeError(
            "This derivative needs a value that the tape's block has used and that no longer exists. Received: a "
            f"recorded array of shape {gone[0].shape} and dtype {gone[0].dtype}, which was deleted since. On JAX, "
            "`fit`, `train_on_batch` and other compiled steps delete the arrays of the variables that they update. "
            "Take the derivative before, or record the block again with the current values."
        ) from error


class _CompiledSweeps:
    """A cache of compiled sweeps, by the structure of the slice. At most `most`, with weak references to functions.

    A structure is compiled when it occurs for the second time (or with `at_once`). Compiling would be wasted on a sweep
    that runs only once, or that contains a function which is created anew every time. The compiled function reads the
    current slice from `_at_hand` while JAX traces it, for every new shape, so it keeps no slice alive.
    """

    def __init__(self, most):
        self.most = most
        self._entries = collections.OrderedDict()
        self._lock = threading.Lock()
        self._at_hand = threading.local()

    def run(self, mode, part, arrays, vectors, at_once=False):
        compiled = self._find(mode, part, at_once)
        if compiled is None:
            return mode(part, arrays, vectors)
        self._at_hand.part = part
        try:
            return compiled(arrays, vectors)
        finally:
            self._at_hand.part = None

    def _find(self, mode, part, at_once):
        try:
            key = (mode, part.structure())
        except TypeError:
            return None
        with self._lock:
            met = at_once or key in self._entries
            compiled = self._entries.pop(key, None)
            if met and compiled is None:
                compiled = jax.jit(lambda arrays, vectors: mode(self._at_hand.part, arrays, vectors))
            self._entries[key] = compiled
            if len(self._entries) > self.most:
                self._entries.popitem(last=False)
        return compiled

    def entries(self):
        """The entries, oldest first: a compiled function, or None for a structure that has occurred once."""
        return list(self._entries.values())

    def clear(self):
        with self._lock:
            self._entries.clear()


compiled_sweeps = _CompiledSweeps(most=256)


def _weak_operation(operation):
    if operation.rule is not None:
        return operation.primitive, operation.rule, len(operation.differentiable)
    if operation.primitive.name == "call_hi_primitive":
        raise TypeError("The rules of a high-level primitive are Python, which may change.")
    parameters = tuple((name, _weak(operation.params[name])) for name in sorted(operation.params))
    return operation.primitive, _weak(operation.subfuns), parameters


def _weak(value):
    """Returns what represents a parameter in a key. It keeps no function alive."""
    if isinstance(value, tuple):
        return tuple(_weak(v) for v in value)
    if isinstance(value, WrappedFun):
        return weakref.ref(value.f), _transforms(value), value.in_type
    if isinstance(value, types.FunctionType):
        return weakref.ref(value)
    if isinstance(value, ClosedJaxpr):
        text = _texts.get(value)
        if text is None:
            text = _texts[value] = jax_programs.text_of(value)
        return text or weakref.ref(value)
    return value


def _transforms(fun):
    """The transformations of a function with a custom derivative, for a key.

    Some contain functions that are created anew at every call. For JAX's own functions (relu) these make no difference
    and are left out. For all others they stay, so that a function that closes over changing state is never found in the
    cache: its program would have the former state compiled in.
    """
    if not getattr(fun.f, "__module__", "").startswith("jax."):
        return fun.transforms
    return tuple(
        (transform, tuple(None if isinstance(p, types.FunctionType) else p for p in parameters))
        for transform, parameters in fun.transforms
    )


# `lax.scan` and similar functions make a new program at every call, but its text stays the same.
_texts = weakref.WeakKeyDictionary()
