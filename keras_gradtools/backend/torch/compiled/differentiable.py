"""Gradients of the results of a program.

A program has no graph. If its results would require gradients, they get one node of autograd's graph, whose backward
pass calls the function again, eagerly, in the context of the first call, and differentiates that.
"""

import torch

from keras_gradtools.backend.torch.random_numbers import random_state, with_random_state
from keras_gradtools.keras_internals.scopes import global_state
from keras_gradtools.keras_state import recording
from keras_gradtools.keras_state.scopes import StateScope

_AMBIENT = ("autocast_scope", "current_call_ctx")
# Values of variables that are no weights are copied up to this many elements, because the next call may change them.
_COPIED = 65536


class Differentiable:
    """A call of a function whose results may be differentiated.

    Args:
        fun: The function of the leaves of the arguments, which returns the list of the tensors in its result.
        leaves: The leaves.
        program: Its `Program`.
        note_use: Called when a result is differentiated.
    """

    def __init__(self, fun, leaves, program, note_use):
        self._fun, self._leaves, self._note_use = fun, leaves, note_use
        variables = program.variables
        weights = [v for v in variables if v._value.requires_grad]
        self._places = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and x.requires_grad]
        self._weights = [(v, v._value, v._value._version) for v in weights]
        self._state = []
        for v in variables:
            value = v._value
            if not value.requires_grad:
                value = value.detach().clone() if value.numel() <= _COPIED else value
                self._state.append((v, value, value._version))
        self._random_state = random_state() if program.draws else None
        self._ambient = [global_state.get_global_attribute(name) for name in _AMBIENT]

    def attached(self, results, places):
        """`results` as a list, of which those at `places` are new tensors that require gradients."""
        sources = [*[self._leaves[i] for i in self._places], *[value for _, value, _ in self._weights]]
        results = list(results)
        for i, x in zip(places, _Recomputed.apply(self, [results[i] for i in places], places, *sources), strict=True):
            results[i] = x
        return results

    def gradients(self, given, upstream, places, creates_graph):
        """The gradients for the sources, whose values are `given`, of the results at `places`."""
        self._note_use()
        for variable, value, version in (*self._weights, *self._state):
            if value._version != version or value.requires_grad and value is not variable._value:
                raise RuntimeError("a variable that a compiled function has read was modified by an inplace operation")
        # Aliases, so that the gradient for one source does not include paths through another one.
        with torch.enable_grad():
            aliases = [x.view_as(x) for x in given]
            leaves = list(self._leaves)
            for i, x in zip(self._places, aliases, strict=False):
                leaves[i] = x
            weights = zip(self._weights, aliases[len(self._places) :], strict=True)
            mapping = [(v, x) for (v, _, _), x in weights] + [(v, value) for v, value, _ in self._state]
            results = self._run(leaves, mapping)
            outputs = [results[i] for i in places]
            return torch.autograd.grad(outputs, aliases, upstream, create_graph=creates_graph, allow_unused=True)

    def _run(self, leaves, mapping):
        now = [global_state.get_global_attribute(name) for name in _AMBIENT]
        unseen, scope = recording.unseen(), StateScope(mapping)
        _set_ambient(self._ambient)
        try:
            with unseen, unseen, scope, scope:
                if self._random_state is None:
                    return self._fun(leaves)
                block = with_random_state(self._random_state)
                with block, block:
                    return self._fun(leaves)
        finally:
            _set_ambient(now)


def _set_ambient(values):
    for name, value in zip(_AMBIENT, values, strict=True):
        global_state.set_global_attribute(name, value)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, results, places, *sources):
        ctx.set_materialize_grads(False)
        # Saved so that torch checks that they were not overwritten.
        ctx.save_for_backward(*sources)
        ctx.call, ctx.places = call, places
        return tuple(results)

    @staticmethod
    def backward(ctx, *upstream):
        creates_graph = torch.is_grad_enabled()
        pairs = [(i, u) for i, u in zip(ctx.places, upstream, strict=True) if u is not None]
        if not pairs:
            return (None,) * (3 + len(ctx.saved_tensors))
        places, given = zip(*pairs, strict=True)
        return (None, None, None, *ctx.call.gradients(ctx.saved_tensors, given, places, creates_graph))
