"""A warning where second derivatives are zero everywhere, because a function is piecewise linear."""

import functools
import types
import warnings
import weakref

from keras_gradtools import backend
from keras_gradtools.backend import steps as kinds


def warn_of_kinks(name, steps):
    """Warns, once for each `name`, if there are kinks in `steps`, through which all second derivatives are zero.

    Nothing is said of a function that is linear, as far as its operations tell.
    """
    if any(step.is_piecewise_linear for step in steps):
        _warn(name)


class Judgement:
    """Judges a function once, as the recording of its operations takes longer than a call of a small function.

    Attributes:
        operations: The block for a `TapedCall` of the function. None if it was judged before.
    """

    def __init__(self, name, fun, argnums):
        self._name, self._key = name, (name, argnums)
        self._former = _former_judgements(fun)
        self.operations = None if self._key in self._former else backend.operations()

    def warn_if_piecewise_linear(self, call):
        """Warns as `warn_of_kinks` if the function of a `TapedCall`, in which `operations` was used, is."""
        if self.operations is None:
            return
        self._former.add(self._key)
        parts = backend.steps_between(call.tape, self.operations, call.flat_targets, call.flat_sources)
        if parts is not None and all(step.is_piecewise_linear or step.kind == kinds.LINEAR for step in parts[0]):
            warn_of_kinks(self._name, parts[0])


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
