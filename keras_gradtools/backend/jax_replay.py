"""Differentiating what a JAX tape has recorded: cut the part out that matters, replay it, compile it.

A record is replayed under JAX's own `vjp` or `jvp`. Op by op that is slower than the block was, so from
the second time on that the same structure is met it is compiled, with every array as an argument; inside
an enclosing `jax.jit` there is nothing to do, because the compiler removes the replay.
"""

import collections
import threading
import weakref

import jax
from jax._src.linear_util import WrappedFun
from jax.extend.core import ClosedJaxpr

from keras_gradtools.backend import jax_trace


class Slice:
    """The recorded operations through which `targets` depend on `sources`, as a function of the sources.

    Values become numbered slots: first the sources, then the constants, then what the operations make.
    A source that is itself made by an operation of the slice, from other sources, is met twice: its slot
    as a source is a perturbation added to what the operation makes.
    """

    def __init__(self, tape, targets, sources):
        source_ids = {id(s) for s in sources if id(s) in tape.followed}
        operations = _between(tape.operations, source_ids, targets)
        made = {id(x) for operation in operations for x in operation.outputs}
        read = {id(x) for operation in operations for x in operation.inputs} | {id(t) for t in targets}

        self.inputs = list({id(s): s for s in sources if id(s) in source_ids and id(s) in read}.values())
        slots = {id(x): i for i, x in enumerate(self.inputs)}
        self.source_slots = [slots.get(id(s)) for s in sources]
        self.perturbed = tuple(id(x) in made for x in self.inputs)

        self.constants = []
        for operation in operations:
            for x in operation.inputs:
                if id(x) not in slots and id(x) not in made:
                    slots[id(x)] = len(self.inputs) + len(self.constants)
                    self.constants.append(x)
        self.steps = []
        next_slot = len(self.inputs) + len(self.constants)
        perturbations = {id(x): i for i, x in enumerate(self.inputs) if id(x) in made}
        for operation in operations:
            ins = tuple(slots[id(x)] for x in operation.inputs)
            outs = tuple(range(next_slot, next_slot + len(operation.outputs)))
            next_slot += len(outs)
            slots.update(zip(map(id, operation.outputs), outs, strict=True))
            added = tuple((slots[id(x)], perturbations[id(x)]) for x in operation.outputs if id(x) in perturbations)
            self.steps.append((operation, ins, outs, added))
        self.target_slots = [slots[id(t)] if id(t) in source_ids or id(t) in made else None for t in targets]

    def run(self, inputs, constants):
        """Computes the connected targets again, from the sources in `inputs`."""
        values = dict(enumerate([*inputs, *constants]))
        for operation, ins, outs, added in self.steps:
            values.update(zip(outs, operation.bind([values[i] for i in ins]), strict=True))
            for made, source in added:
                values[made] = values[made] + inputs[source]
        return [values[slot] for slot in self.target_slots if slot is not None]

    def starting_point(self, inputs):
        """Where `run` is differentiated: a source's value, or no perturbation of what an operation makes."""
        return [jax.numpy.zeros_like(x) if p else x for x, p in zip(inputs, self.perturbed, strict=True)]

    def has_custom_vjp(self):
        return any(jax_trace.has_primitive(operation, "custom_vjp_call") for operation, *_ in self.steps)

    def structure(self):
        """A hashable key of everything but the arrays; TypeError if some parameter cannot be hashed."""
        steps = tuple(
            (operation.primitive, _weak(operation.subfuns), _weak_parameters(operation.params), ins, outs, added)
            for operation, ins, outs, added in self.steps
        )
        key = (steps, self.perturbed, len(self.constants), tuple(self.target_slots))
        hash(key)
        return key


def _between(operations, source_ids, targets):
    """The operations that lie on a path from a source to a target."""
    reached = set(source_ids)
    forward = []
    for operation in operations:
        if any(id(x) in reached for x in operation.inputs):
            forward.append(operation)
            reached.update(id(x) for x in operation.outputs if jax_trace.is_followable(x))
    needed = {id(t) for t in targets if id(t) in reached}
    backward = []
    for operation in reversed(forward):
        if any(id(x) in needed for x in operation.outputs):
            backward.append(operation)
            needed.update(id(x) for x in operation.inputs if id(x) in reached)
    return backward[::-1]


def pull(part, inputs, constants, cotangents):
    _, pullback = jax.vjp(lambda *xs: part.run(xs, constants), *part.starting_point(inputs))
    return pullback(cotangents)


def pull_batch(part, inputs, constants, cotangents):
    _, pullback = jax.vjp(lambda *xs: part.run(xs, constants), *part.starting_point(inputs))
    return jax.vmap(pullback)(cotangents)


def push(part, inputs, constants, tangents):
    start = part.starting_point(inputs)
    if not part.has_custom_vjp():
        return jax.jvp(lambda *xs: part.run(xs, constants), start, tangents)[1]
    # Forward mode cannot pass a `custom_vjp`; the pullback, being linear, can be pulled back itself.
    targets, pullback = jax.vjp(lambda *xs: part.run(xs, constants), *start)
    _, push = jax.vjp(pullback, [jax.numpy.zeros_like(t) for t in targets])
    return push(tuple(tangents))[0]


def push_batch(part, inputs, constants, tangents):
    return jax.vmap(lambda *rows: push(part, inputs, constants, rows))(*tangents)


def differentiate(mode, part, vectors):
    """Runs `mode` (one of the functions above) on a slice, compiled where that pays."""
    if not part.steps or jax_trace.is_traced([*part.inputs, *part.constants, *vectors]):
        return mode(part, part.inputs, part.constants, vectors)
    return _compiled.run(mode, part, vectors)


class _CompiledReplays:
    """Compiled replays by structure: bounded, and holding the user's functions weakly.

    A structure is compiled when it is met for the second time, so that what runs once, or has a function in
    it that is made anew every time, is never compiled in vain. The compiled function gets the slice at hand
    only while it runs (it looks at it when JAX traces it, for every new shape): it keeps none alive.
    """

    def __init__(self, most):
        self._most = most
        self._entries = collections.OrderedDict()
        self._lock = threading.Lock()
        self._at_hand = threading.local()

    def run(self, mode, part, vectors):
        compiled = self._find(mode, part)
        if compiled is None:
            return mode(part, part.inputs, part.constants, vectors)
        self._at_hand.part = part
        try:
            return compiled(part.inputs, part.constants, vectors)
        finally:
            self._at_hand.part = None

    def _find(self, mode, part):
        try:
            key = (mode, part.structure())
        except TypeError:
            return None
        with self._lock:
            met = key in self._entries
            compiled = self._entries.pop(key, None)
            if met and compiled is None:
                compiled = jax.jit(lambda *arrays: mode(self._at_hand.part, *arrays))
            self._entries[key] = compiled
            if len(self._entries) > self._most:
                self._entries.popitem(last=False)
        return compiled

    def __len__(self):
        return len(self._entries)

    def clear(self):
        with self._lock:
            self._entries.clear()


_compiled = _CompiledReplays(most=256)


def _weak_parameters(params):
    return tuple(sorted((name, _weak(value)) for name, value in params.items()))


def _weak(value):
    """Stands for a parameter in a key, without keeping the functions alive that it is made of."""
    if isinstance(value, tuple):
        return tuple(_weak(v) for v in value)
    if isinstance(value, WrappedFun):
        return weakref.ref(value.f), value.transforms, value.in_type
    if isinstance(value, ClosedJaxpr):
        text = _texts.get(value)
        if text is None:
            text = _texts[value] = jax_trace.text_of(value)
        return text or weakref.ref(value)
    return value


# `lax.scan` and its like make a new program at every call: it is its text that stays the same.
_texts = weakref.WeakKeyDictionary()
