"""Recorded operations as one Python function, without those whose results are not needed."""

import math
import weakref

import torch

from keras_gradtools.backend.torch.compiled import inductor
from keras_gradtools.backend.torch.compiled.bindings import fastest
from keras_gradtools.backend.torch.compiled.operations import GUARD, Slot, slots_in, with_slots
from keras_gradtools.backend.torch.compiled.tensors import ARGUMENT, CONSTANT, VARIABLE


class Diverged(Exception):  # noqa: N818 - not an error
    """A bool that Python reads is not what it was when the program was recorded."""


def diverge():
    raise Diverged


# Their result shares the memory of their argument, and is a new tensor only for autograd.
_ALIASES = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}


class Program:
    """The recorded operations of one call, and what they need to run again.

    - `arguments`: the numbers of the arguments that they use. `variables`: the Keras variables. `captured`: weak
      references to captured tensors. `function` takes the tensors of these three, and returns the tensors of the slots
      `outputs` as a tuple.
    - `is_replayed`: whether all operations run one by one, and none are compiled by inductor.
    - `draws`: whether they draw random numbers.
    - `restored`: the positions of the tensors given to `function` that may have changed when it raises `Diverged`.
      `draws_before_guard`: whether it may have drawn random numbers by then.
    - `written_variables`: the variables whose values it overwrites.
    """

    def __init__(self, recorder, outputs, compiler=None):
        operations = _without_aliases(recorder, outputs)
        if not recorder.draws:
            operations = [op for op in operations if op.function not in recorder.of_random_state]
        operations = _needed(operations, outputs)
        tensors = recorder.tensors
        writer = _Writer(tensors, outputs)
        self.is_replayed = compiler is None
        self.function = writer.write(
            operations if self.is_replayed else inductor.compiled(operations, tensors, outputs)
        )
        self.arguments, self.variables = list(writer.arguments.values()), list(writer.variables.values())
        # If a tensor is captured and nobody else holds it any longer, the function now captures another one.
        self.captured = [weakref.ref(x) for x in writer.captured.values()]
        self.draws = recorder.draws
        before = _before_last_guard(operations)
        self.draws_before_guard = any(map(_draws, before))
        overwritten = {tensors.storages[s] for op in before for s in op.mutated}
        self.restored = [i for i, s in enumerate(writer.given) if tensors.storages[s] in overwritten]
        self.written_variables = [x for s, x in writer.variables.items() if tensors.storages[s] in tensors.written]


def _draws(operation):
    """Whether it may draw random numbers."""
    return operation.is_kept and operation.function is not GUARD


def _before_last_guard(operations):
    places = [i for i, op in enumerate(operations) if op.function is GUARD]
    return operations[: places[-1]] if places else []


def _without_aliases(recorder, outputs):
    """Replaces aliases by what they are aliases of."""
    same, kept, returned = {}, [], set(outputs)

    def find(slot):
        return same.get(slot, slot)

    for op in recorder.operations:
        op = op._replace(
            args=with_slots(op.args, find),
            kwargs=with_slots(op.kwargs, find),
            mutated=with_slots(op.mutated, find),
        )
        if op.function in _ALIASES and op.outputs[0] not in returned and not recorder.reshapes:
            same[op.outputs[0]] = op.args[0]
        else:
            kept.append(op)
    return kept


def _needed(operations, outputs):
    wanted, kept = set(outputs), []
    for op in reversed(operations):
        if op.is_kept or any(s in wanted for s in op.outputs):
            wanted.update(slots_in((op.args, op.kwargs)))
            kept.append(op)
    return kept[::-1]


class _Writer:
    """Writes the source of a function. Values that have no literal become global names."""

    def __init__(self, tensors, outputs):
        self._tensors, self._outputs = tensors, outputs
        self.exposed = tensors.written | {tensors.storages[s] for s in outputs}
        self._names: dict = {"diverge": diverge}
        self._known: dict = {}
        self.arguments: dict = {}
        self.variables: dict = {}
        self.captured: dict = {}
        self.given: list = []
        self._lines: list = []
        self._defined: set = set()

    def write(self, operations):
        last = self._last_uses(operations, self._outputs)
        for i, op in enumerate(operations):
            self._write(op)
            gone = [f"t{s}" for s in last.get(i, ()) if s in self._defined]
            if gone:
                self._lines.append(f"del {', '.join(gone)}")
        returned = [self._slot(s) for s in self._outputs]
        self.given = [*self.arguments, *self.variables, *self.captured]
        parameters = ", ".join(f"t{s}" for s in self.given)
        lines = [*self._lines, f"return ({''.join(r + ', ' for r in returned)})"]
        source = f"def program({parameters}):\n    " + "\n    ".join(lines)
        exec(compile(source, "<recorded operations>", "exec"), self._names)  # noqa: S102
        return self._names["program"]

    @staticmethod
    def _last_uses(operations, outputs):
        """The slots that are not used after the operation of each number."""
        seen, last = set(outputs), {}
        for i in reversed(range(len(operations))):
            op = operations[i]
            used = {s for s in op.outputs if s is not None}
            used.update(slots_in((op.args, op.kwargs)))
            last[i] = sorted(used - seen)
            seen |= used
        return last

    def _write(self, op):
        if op.function is GUARD:
            slot, value = op.args
            self._lines.append(f"if {'not ' if value else ''}{self._slot(slot)}: diverge()")
            return
        given = [self._literal(x) for x in op.args]
        given += [f"{name}={self._literal(x)}" for name, x in op.kwargs.items()]
        call = f"{self._name('f', fastest(op.function))}({', '.join(given)})"
        targets = ["_" if s is None or s in op.mutated or s in self._defined else self._define(s) for s in op.outputs]
        if all(t == "_" for t in targets):
            self._lines.append(call)
        elif op.is_single:
            self._lines.append(f"{targets[0]} = {call}")
        else:
            self._lines.append(f"{''.join(t + ', ' for t in targets)} = {call}")

    def _define(self, slot):
        self._defined.add(slot)
        return f"t{slot}"

    def _slot(self, slot):
        source = self._tensors.sources[slot]
        if source is None:
            return f"t{slot}"
        kind, x = source
        if kind == ARGUMENT:
            self.arguments[slot] = x
        elif kind == VARIABLE:
            self.variables[slot] = x
        elif kind == CONSTANT:
            name = self._name("c", x)
            if self._tensors.storages[slot] not in self.exposed:
                return name
            # The function may change it or give it to its caller.
            if slot not in self._defined:
                self._lines.append(f"{self._define(slot)} = {name}.clone()")
        else:
            self.captured[slot] = x
        return f"t{slot}"

    def _literal(self, x):
        if isinstance(x, Slot):
            return self._slot(x)
        if isinstance(x, list):
            return f"[{', '.join(map(self._literal, x))}]"
        if isinstance(x, tuple):
            return f"({''.join(self._literal(y) + ', ' for y in x)})"
        if x is None or isinstance(x, (bool, int, str)) or isinstance(x, float) and math.isfinite(x):
            return repr(x)
        return self._name("x", x)

    def _name(self, prefix, x):
        name = self._known.get(id(x))
        if name is None:
            name = self._known[id(x)] = f"{prefix}{len(self._names)}"
            self._names[name] = x
        return name
