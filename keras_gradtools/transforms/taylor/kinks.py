"""A warning where second derivatives are zero everywhere, because a function is piecewise linear."""

import functools
import types
import warnings
import weakref

from keras_gradtools import backend
from keras_gradtools.backend import steps as kinds


def warn_of_kinks(name, steps):
    """Warns, once for each `name`, if there are kinks in `steps`, through which all second derivatives are zero.

    It does not warn of a function that is linear, as far as its operations tell.
    """
    if any(step.is_piecewise_linear for step in steps):
        _warn(name)


def is_piecewise_linear(call, operations, sources):
    """Whether a `TapedCall` has kinks, and is linear in `sources` between them, as far as its operations tell.

    `operations` is the block of the call.
    """
    parts = backend.steps_between(call.tape, operations, call.flat_targets, sources)
    if parts is None or not all(step.is_piecewise_linear or step.kind == kinds.LINEAR for step in parts[0]):
        return False
    return any(step.is_piecewise_linear for step in parts[0])


class Judgement:
    """Judges whether a function is piecewise linear, but only once, because it must record the operations.

    This takes longer than a call of a small function.

    Attributes:
        operations: The block for a `TapedCall` of the function. None if it was judged before.
    """

    def __init__(self, name, fun, argnums):
        self._name, self._key = name, (name, argnums)
        self._former = _former_judgements(fun)
        self.operations = None if self._key in self._former else backend.operations()

    def warn_if_piecewise_linear(self, call):
        """Warns as `warn_of_kinks`. `call` is a `TapedCall` of the function, with the block `operations`."""
        if self.operations is None:
            return
        self._former.add(self._key)
        if is_piecewise_linear(call, self.operations, call.flat_sources):
            _warn(self._name)


_judgements: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _former_judgements(fun):
    owner = fun.__self__ if isinstance(fun, types.MethodType) else fun
    try:
        return _judgements.setdefault(owner, set())
    except TypeError:  # It cannot be held weakly, or not be hashed.
        return set()


@functools.cache
def _warn(name):
    warnings.warn(
        f"{name}: all second derivatives are zero, because the function is piecewise linear. It has kinks, as of ReLU, "
        "leaky ReLU, `abs`, `maximum` or `where`, and nothing that is curved. A loss on these zeros is constant, and "
        "trains nothing. Use a smooth activation, such as tanh, GELU, SiLU or softplus.",
        stacklevel=3,
    )
