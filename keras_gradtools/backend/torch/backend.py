"""The kernels on torch, built on autograd's graph.

torch has no tape: `tape.py` makes one from autograd's graph, and `graph.py` finds the nodes that a tape has recorded.
`formulas.py`, `fused.py`, `unfused.py`, `keras_ops.py` and `checkpoint.py` correct operations that torch cannot
differentiate twice.
"""

import keras
import torch

from keras_gradtools.backend.base import Backend
from keras_gradtools.backend.torch import (
    checkpoint,
    fused,
    graph,
    keras_ops,
    memory,
    pullbacks,
    pushforwards,
    steps,
    tape,
)
from keras_gradtools.backend.torch.compiled import logs, notices, seeds
from keras_gradtools.backend.torch.compiled.jit import jit, may_replay
from keras_gradtools.backend.torch.containers import containers
from keras_gradtools.backend.torch.custom_gradient import custom_gradient
from keras_gradtools.backend.torch.per_example import per_example_gradients
from keras_gradtools.backend.torch.processes import summed_over_processes
from keras_gradtools.backend.torch.random_numbers import get_device, random_state, with_random_state

tape.install()
checkpoint.install()
fused.install()
keras_ops.install()
notices.install()
seeds.install()
logs.install()


class TorchBackend(Backend):
    """The kernels on torch. A kernel that is a function of another file is a static method here."""

    Tape = tape.Tape

    COMPILERS = ("inductor",)
    LINEARIZES_ONCE = True
    CHUNKS_ALWAYS_PAY = True

    pullback = staticmethod(pullbacks.pullback)
    constant_pullback = staticmethod(pullbacks.constant_pullback)
    pullback_batch = staticmethod(pullbacks.pullback_batch)
    pushforward_batch = staticmethod(pushforwards.pushforward_batch)
    linearize = staticmethod(pushforwards.linearize)
    operations = staticmethod(steps.Operations)
    steps_between = staticmethod(steps.steps_between)
    per_example_gradients = staticmethod(per_example_gradients)
    custom_gradient = staticmethod(custom_gradient)
    jit = staticmethod(jit)
    may_compile = staticmethod(may_replay)
    compiled_step = staticmethod(jit)
    computed_bytes = staticmethod(memory.computed_bytes)
    free_bytes = staticmethod(memory.free_bytes)
    containers = staticmethod(containers)
    random_state = staticmethod(random_state)
    with_random_state = with_random_state
    summed_over_processes = staticmethod(summed_over_processes)

    def threads(self):
        return torch.get_num_threads() if get_device() == "cpu" else None

    def is_recording_values(self):
        return notices.current() is not None

    def alias(self, x):
        # Without grad mode, the alias of a tensor that requires gradients would not be connected to it.
        if torch.is_grad_enabled():
            return x.view_as(x)
        block = graph.GradMode(True)
        with block, block:
            return x.view_as(x)

    def add_product(self, variable, factor, left, right):
        left, right = (keras.ops.convert_to_tensor(x, dtype=variable.dtype) for x in (left, right))
        block = graph.GradMode(False)
        with block, block:
            # In place, so that no operation makes a new matrix.
            variable.value.addmm_(left, right, beta=factor)

    def is_true_in_all_processes(self, condition):
        (agreeing,), count = summed_over_processes([torch.tensor(float(condition))], 1)
        return float(agreeing) == count

    def long_dot(self, a, b):
        return torch.dot(a, b)

    def viewed(self, x):
        return super().viewed(x.detach().cpu() if torch.is_tensor(x) else x)

    def settled(self, tensors):
        attached = [t for t in tensors if t.requires_grad]
        if not attached or pullbacks.may_be_recorded(lambda: graph.is_used_outside(pullbacks.nodes_of(attached))):
            return tensors
        return [t.detach() if t.requires_grad else t for t in tensors]

    def modes_kept(self):
        return graph.GradMode(torch.is_grad_enabled())

    def train_function(self, model, step):
        def function(data):
            # `data` is a list of `steps_per_execution` batches, or fewer at the end of an epoch.
            for batch in data:
                logs = step(batch)
            return logs

        return function
