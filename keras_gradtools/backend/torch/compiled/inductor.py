"""Recorded operations compiled by inductor, torch's own compiler, which fuses them into C++ or Triton code.

Derivatives are among the recorded operations, so inductor differentiates nothing. It cannot compile what reads a bool,
makes a random generator or draws from one. These operations run one by one, between the groups that it compiles.
"""

import itertools
import operator
from typing import Any

import torch

from keras_gradtools.backend import causes
from keras_gradtools.backend.torch.compiled.operations import GUARD, Operation, facts, slots_in, with_slots

# A smaller group takes longer as a program of its own than one by one.
_LEAST = 8


def compiled(operations, tensors, outputs):
    """The operations, with each group that inductor compiles as one `Operation`. `outputs` are the slots needed."""
    operations = _earlier(operations, tensors)
    groups = [(k, list(g)) for k, g in itertools.groupby(operations, lambda op: _is_compilable(op, tensors))]
    is_only_one = sum(k for k, _ in groups) == 1
    needed, result = set(outputs), []
    for is_compilable, group in reversed(groups):
        if is_compilable and (is_only_one or len(group) >= _LEAST):
            group = [_as_one(group, needed)]
        needed.update(slot for op in group for slot in slots_in((op.args, op.kwargs)))
        result = group + result
    return result


def _is_compilable(op, tensors):
    if not isinstance(op.function, torch._ops.OpOverload):
        return False
    return not any(map(tensors.is_generator, slots_in((op.args, op.kwargs))))


def _earlier(operations, tensors):
    """Moves what inductor cannot compile, and what this depends on, before all other operations.

    A generator depends on a seed only, not on the layers before it. The other operations then are one group.
    """
    if any(op.function is GUARD for op in operations):
        # What follows a guard must not run before it.
        return operations
    first, others, later = [], [], _Uses(tensors)
    for op in reversed(operations):
        if not _is_compilable(op, tensors) or later.depend_on(op):
            first.append(op)
            later.add(op)
        else:
            others.append(op)
    return first[::-1] + others[::-1]


class _Uses:
    """What some operations use: slots, memory, and torch's own random generators."""

    def __init__(self, tensors):
        self._tensors = tensors
        self._slots, self._used, self._written, self._draws = set(), set(), set(), False

    def add(self, op):
        slots, used, written, draws = self._of(op)
        self._slots |= slots
        self._used |= used
        self._written |= written
        self._draws |= draws

    def depend_on(self, op):
        """Whether one of them must run after `op`, which came before them."""
        _, used, written, draws = self._of(op)
        if not self._slots.isdisjoint(op.outputs) or draws and self._draws:
            return True
        return not (written.isdisjoint(self._used) and used.isdisjoint(self._written))

    def _of(self, op):
        memory = self._tensors.storages
        slots = set(slots_in((op.args, op.kwargs)))
        # What is no operation of torch makes a generator, or reads or sets the state of one.
        draws = not isinstance(op.function, torch._ops.OpOverload) or facts(op.function).draws
        return slots, {memory[s] for s in slots} - {None}, {memory[s] for s in op.mutated}, draws


def _as_one(operations, needed):
    """An operation that does the same as all `operations`. `needed` are the slots that are used after them."""
    made = {s for op in operations for s in op.outputs if s is not None and s not in op.mutated}
    given = sorted({s for op in operations for s in slots_in((op.args, op.kwargs))} - made)
    outputs = sorted(made & needed)
    mutated = tuple(sorted({s for op in operations for s in op.mutated} - made))
    return Operation(_Group(operations, given, outputs), tuple(given), {}, tuple(outputs), False, mutated, True)


class _Group:
    """A function of the tensors in the slots `given`, which returns those of `outputs`. Compiled at its first call."""

    def __init__(self, operations, given, outputs):
        graph = torch.fx.Graph()
        values = {slot: graph.placeholder(f"t{slot}") for slot in given}
        for op in operations:
            args, kwargs = with_slots((op.args, op.kwargs), values.__getitem__)
            node = graph.call_function(op.function, args, kwargs)
            for i, slot in enumerate(op.outputs):
                if slot is not None and slot not in op.mutated:
                    values[slot] = node if op.is_single else graph.call_function(operator.getitem, (node, i))
        graph.output(tuple([values[slot] for slot in outputs]))
        self._module = torch.fx.GraphModule({}, graph)
        self._run: Any = None

    def __call__(self, *given):
        if self._run is None:
            self._run = _compile(self._module, given)
        return self._run(*given)


def _compile(module, given):
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    try:
        # Random numbers are then those of eager code.
        with config.patch(fallback_random=True):
            return compile_fx(module, list(given))
    except Exception as error:
        if any("InvalidCxxCompiler" in f"{type(e).__name__} {e}" for e in causes.of(error)):
            raise RuntimeError(
                "`kg.jit` with compiler='inductor' needs a C++ compiler, and torch has found none. Received: torch's "
                f"error {str(error).strip().splitlines()[0]!r}. Install g++ or clang, or name one in the environment "
                "variable CXX. Without `compiler`, no compiler is needed."
            ) from error
        raise
