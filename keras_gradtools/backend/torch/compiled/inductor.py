"""Recorded operations compiled by inductor, torch's own compiler, which fuses them into C++ or Triton code.

Derivatives are among the recorded operations, so inductor differentiates nothing.
"""

import operator
from typing import Any

import torch

from keras_gradtools.backend import causes
from keras_gradtools.backend.torch.compiled.operations import slots_in, with_slots
from keras_gradtools.backend.torch.compiled.tensors import CONSTANT


def cannot_compile(operations):
    """Why inductor cannot compile these operations, or None."""
    for op in operations:
        if not isinstance(op.function, torch._ops.OpOverload):
            return "it reads a bool, or the seed or the state of a random generator"
    return None


class Compiled:
    """A function of the tensors in the slots `given`, which returns those of `outputs`. Compiled at its first call."""

    def __init__(self, tensors, operations, given, outputs, exposed):
        self._constants: list = []
        graph = torch.fx.Graph()
        values = {slot: graph.placeholder(f"t{slot}") for slot in given}
        used = {slot for op in operations for slot in slots_in((op.args, op.kwargs))} | set(outputs)
        copied = []
        for slot in sorted(used):
            source = tensors.sources[slot]
            if source is not None and source[0] == CONSTANT:
                values[slot] = graph.placeholder(f"t{slot}")
                self._constants.append(source[1])
                if tensors.storages[slot] in exposed:
                    copied.append(slot)
        for slot in copied:
            values[slot] = graph.call_function(torch.ops.aten.clone.default, (values[slot],))
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
        tensors = [*given, *self._constants]
        if self._run is None:
            self._run = _compile(self._module, tensors)
        return self._run(*tensors)


def _compile(module, given):
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    try:
        # Random numbers are then those of eager code.
        with config.patch(fallback_random=True):
            return compile_fx(module, given)
    except Exception as error:
        if any("InvalidCxxCompiler" in f"{type(e).__name__} {e}" for e in causes.of(error)):
            raise RuntimeError(
                "`kg.jit` with compiler='inductor' needs a C++ compiler, and torch has found none. Received: torch's "
                f"error {str(error).strip().splitlines()[0]!r}. Install g++ or clang, or name one in the environment "
                "variable CXX. Without `compiler`, no compiler is needed."
            ) from error
        raise
