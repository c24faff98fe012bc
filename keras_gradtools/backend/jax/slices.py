"""The part of a JAX tape between sources and targets, with a number for each value."""

import operator
import typing

from keras_gradtools.backend.jax.aliases import is_followable
from keras_gradtools.backend.jax.operation import Operation


class Step(typing.NamedTuple):
    """An operation of a slice. Inputs and outputs are slots. Derivatives pass through the `active` positions."""

    operation: Operation
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

    Only higher derivatives depend on what the rule of a custom gradient reads. It is part of the slice if `is_higher`.
    """

    def __init__(self, tape, targets, sources, is_higher=False):
        source_ids = {id(s) for s in sources if id(s) in tape.followed}
        passing = operator.attrgetter("inputs" if is_higher else "differentiable")
        operations = _between(tape.operations, source_ids, targets, passing)
        read = {id(x) for operation in operations for x in passing(operation)} | {id(t) for t in targets}
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
            active_inputs = tuple(i for i, x in enumerate(passing(operation)) if id(x) in active)
            active_outputs = tuple(i for i, x in enumerate(operation.outputs) if is_followable(x))
            active.update(id(operation.outputs[i]) for i in active_outputs)
            for x in operation.outputs:
                slots.setdefault(id(x), len(slots))
            ins = tuple(slots[id(x)] for x in operation.inputs)
            outs = tuple(slots[id(x)] for x in operation.outputs)
            self.steps.append(Step(operation, ins, outs, active_inputs, active_outputs))
        self.target_slots = [slots[id(t)] if id(t) in active else None for t in targets]


def _between(operations, source_ids, targets, passing):
    """The operations on a path from a source to a target, through the inputs `passing(operation)`."""
    reached = set(source_ids)
    forward = []
    for operation in operations:
        if any(id(x) in reached for x in passing(operation)):
            forward.append(operation)
            reached.update(id(x) for x in operation.outputs if is_followable(x))
    needed = {id(t) for t in targets if id(t) in reached}
    backward = []
    for operation in reversed(forward):
        if any(id(x) in needed for x in operation.outputs):
            backward.append(operation)
            needed.update(id(x) for x in passing(operation) if id(x) in reached)
    return backward[::-1]
