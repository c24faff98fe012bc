"""A backward pass that stays inside the part of autograd's graph that a tape has recorded."""

import functools
import threading

import torch

from keras_gradtools.backend.torch import formulas
from keras_gradtools.backend.torch.borrowing import borrow, give_back
from keras_gradtools.backend.torch.graph import no_derivative
from keras_gradtools.blocks import Block


class _Thread(threading.local):
    def __init__(self):
        self.passes = []


_thread = _Thread()


class passing(Block):  # noqa: N801 - said of a block
    """A block in which a backward pass stays inside `part`, a `graph.Slice`, and runs on the calling thread only.

    Other threads of autograd's engine would number the nodes of a recorded pass independently. The leaves require
    gradients as when they were recorded, because torch checks that on saved tensors (`linalg.solve`), and a checkpoint
    computes with them again. With `is_recorded`, the pass can be differentiated to any order.
    """

    def __init__(self, part, is_recorded):
        self._part = part
        self._is_recorded = is_recorded
        self._handles = []
        self._was_multithreaded = torch._C._is_multithreading_enabled()
        self._levels = torch._C._functorch.get_dynamic_layer_stack_depth()

    def begin(self):
        _thread.passes.append(self)
        for leaf in self._part.leaves:
            borrow(leaf.variable, self)
        if self._is_recorded:
            for node, formula in formulas.of(self._part.nodes):
                self._hook(node.register_hook, functools.partial(self._replace_by, formula))
        for node in self._part.boundaries:
            self._hook(node.register_prehook, self._stop)
        for node, positions in self._part.early.items():
            self._hook(node.register_hook, functools.partial(self._stop_at, positions))
        torch._C._set_multithreading_enabled(False)

    def _hook(self, register, hook):
        # `extend` with `map` runs in C, so an interrupt cannot come between registering a hook and keeping its handle.
        self._handles.extend(map(register, (hook,)))

    def end(self):
        torch._C._set_multithreading_enabled(self._was_multithreaded)
        # A vectorized pass opens a level of functorch, which an interrupt may leave open.
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(self._levels)
        for handle in self._handles:
            handle.remove()
        for leaf in self._part.leaves:
            give_back(leaf.variable, self)
        while self in _thread.passes:
            _thread.passes.remove(self)

    def __exit__(self, kind=None, error=None, traceback=None):
        was_open = self._is_open
        super().__exit__(kind, error, traceback)
        if was_open and isinstance(error, RuntimeError):
            _raise_clear_error(error)

    def _is_this_pass(self):
        # Hooks are called in every pass. Another one may reach the same nodes, on another thread or inside this pass.
        return bool(_thread.passes) and _thread.passes[-1] is self

    def _stop(self, gradients):
        # None, because zeros would become NaN where a derivative is infinite.
        return (None,) * len(gradients) if self._is_this_pass() else None

    def _replace_by(self, formula, gradients, upstream):
        if not self._is_this_pass():
            return None
        # Only the gradients that this pass needs.
        replaced = formula(upstream, gradients)
        return tuple(r if g is not None else None for g, r in zip(gradients, replaced, strict=True))

    def _stop_at(self, positions, gradients, _):
        if self._is_this_pass():
            return tuple(None if i in positions else g for i, g in enumerate(gradients))
        return None


def _raise_clear_error(error):
    if no_derivative(str(error)):
        raise RuntimeError(no_derivative(str(error))) from error
    if "inplace operation" in str(error):
        raise RuntimeError(
            "A tensor or variable that the tape's block has read was overwritten before the derivative was taken. "
            "torch assigns to a variable in place, so the value that the derivative needs no longer exists. Take the "
            "derivative before `assign` (or the optimizer's step), or let the block read a copy: "
            f"`keras.ops.copy(variable)`. Received: torch's error about an inplace operation: {error}"
        ) from error
