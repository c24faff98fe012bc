"""Lets a checkpoint compute in the backward pass what it has computed in the forward pass.

`keras.remat` and `torch.utils.checkpoint` call their function again when its derivative is taken. By then the block of
the tape is over, and with it all that the function went by besides its arguments: the values that a stateless scope
lent to variables, the precision and the mode of the call around, the unfused kernels, and which tensors require
gradients. What a tape records is computed again under these. This is the one file that reaches into
`torch.utils.checkpoint`.
"""

import contextlib
import functools
import threading
import typing

import torch

from keras_gradtools import nesting
from keras_gradtools.backend import recording
from keras_gradtools.backend.state import StateScope
from keras_gradtools.keras_internals.scopes import global_state

# `torch.utils.checkpoint` is a module, and its function of the same name hides nothing here.
_checkpoint: typing.Any = torch.utils.checkpoint
_AMBIENT = ("stateless_scope", "autocast_scope", "current_call_ctx")
# Up to this many elements, the value of a variable that is not trained is copied: a layer may assign to it.
_COPIED = 65536


class _Thread(threading.local):
    depth = 0


_thread = _Thread()


def is_recomputing():
    """Whether this thread computes something again, that a tape has recorded."""
    return _thread.depth > 0


def install():
    # In the generator, and not in `checkpoint`, of which others may hold a reference of their own.
    original = _checkpoint._checkpoint_without_reentrant_generator

    @functools.wraps(original)
    def generator(fn, *args, **kwargs):
        if not recording.active_tapes():
            return original(fn, *args, **kwargs)
        return _recorded(original, fn, args, kwargs)

    _checkpoint._checkpoint_without_reentrant_generator = generator


def _recorded(original, fn, args, kwargs):
    with _ValuesRead() as log:
        yield from original(_Recomputation(fn, (args, kwargs), log), *args, **kwargs)


class _ValuesRead(recording.ReadLog):
    """Keeps as well the value that each variable had when it was first read."""

    def __init__(self):
        super().__init__()
        self.values = {}

    def note(self, variable, value):
        if id(variable) not in self.values:
            # A seed and statistics are overwritten in place by the layers that read them.
            if not variable.trainable and value.numel() <= _COPIED:
                value = value.detach().clone()
            self.values[id(variable)] = (variable, value, value._version, value.requires_grad)
        super().note(variable, value)


class _Recomputation:
    """`fn` as it was called under a tape: its arguments in the forward pass were `given`, and it has read `log`."""

    def __init__(self, fn, given, log):
        self._fn, self._log = fn, log
        self._required = [t.requires_grad for t in nesting.flatten(given) if isinstance(t, torch.Tensor)]
        self._ambient = [global_state.get_global_attribute(name) for name in _AMBIENT]

    def __call__(self, *args, **kwargs):
        required = iter(self._required)
        args, kwargs = nesting.map_structure(
            lambda x: _requiring(x, next(required)) if isinstance(x, torch.Tensor) else x, (args, kwargs)
        )
        with self._as_before():
            return self._fn(*args, **kwargs)

    @contextlib.contextmanager
    def _as_before(self):
        mapping = []
        for variable, value, version, is_required in self._log.values.values():
            if value._version != version:
                raise RuntimeError("a variable that a checkpoint has read was modified by an inplace operation")
            mapping.append((variable, _requiring(value, is_required)))
        now = [global_state.get_global_attribute(name) for name in _AMBIENT]
        _set_ambient(self._ambient)
        _thread.depth += 1
        try:
            with recording.unseen(), StateScope(mapping):
                yield
        finally:
            _thread.depth -= 1
            _set_ambient(now)


def _requiring(tensor, is_required):
    # Nothing but the flag counts: torch connects what was computed again by itself.
    return tensor if tensor.requires_grad == is_required else tensor.detach().requires_grad_(is_required)


def _set_ambient(values):
    for name, value in zip(_AMBIENT, values, strict=True):
        global_state.set_global_attribute(name, value)
