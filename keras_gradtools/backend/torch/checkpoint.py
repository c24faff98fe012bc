"""Makes a checkpoint compute the same values in the backward pass as in the forward pass under a tape.

`keras.remat` and `torch.utils.checkpoint` call their function again when its derivative is taken. By then, the block of
the tape has ended, and the function would see another context: other values of variables in a stateless scope, another
precision and `training` mode, fused kernels, and tensors that do not require gradients. So a checkpoint that a tape
records restores this context first. Only this file uses private parts of `torch.utils.checkpoint`.
"""

import contextlib
import functools
import threading
import typing

import torch

from keras_gradtools import nesting
from keras_gradtools.keras_internals.scopes import global_state
from keras_gradtools.keras_state import recording
from keras_gradtools.keras_state.scopes import StateScope

# The module `torch.utils.checkpoint`, and not its function of the same name. `Any`, for mypy.
_checkpoint: typing.Any = torch.utils.checkpoint
_AMBIENT = ("stateless_scope", "autocast_scope", "current_call_ctx")
# Values of untrained variables are copied up to this many elements, because a layer may assign to them.
_COPIED = 65536


class _Thread(threading.local):
    depth = 0


_thread = _Thread()


def is_recomputing():
    """Whether this thread is recomputing a checkpoint that a tape has recorded."""
    return _thread.depth > 0


def install():
    # The generator is replaced and not `checkpoint`, which other modules may have imported by name.
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
    """A `ReadLog` that also keeps the value of each variable at its first read."""

    def __init__(self):
        super().__init__()
        self.values = {}

    def note(self, variable, value):
        if id(variable) not in self.values:
            # Layers overwrite seeds and statistics in place after they have read them.
            if not variable.trainable and value.numel() <= _COPIED:
                value = value.detach().clone()
            self.values[id(variable)] = (variable, value, value._version, value.requires_grad)
        super().note(variable, value)


class _Recomputation:
    """Calls `fn` again in the context of its call under a tape.

    `given`: The arguments of the forward pass. `log`: A `_ValuesRead` with the variables that `fn` read then.
    """

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
    # Only the flag must be right. torch itself connects the recomputed tensors with the graph.
    return tensor if tensor.requires_grad == is_required else tensor.detach().requires_grad_(is_required)


def _set_ambient(values):
    for name, value in zip(_AMBIENT, values, strict=True):
        global_state.set_global_attribute(name, value)
