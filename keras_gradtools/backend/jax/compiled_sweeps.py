"""A cache of compiled sweeps.

Run eagerly, one operation at a time, a sweep is slower than the recorded block. So from the second time that the same
structure occurs, it is compiled, with all arrays as arguments.
"""

import collections
import threading
import types
import weakref

import jax
from jax._src.linear_util import WrappedFun
from jax.extend.core import ClosedJaxpr

from keras_gradtools.backend.jax import jaxprs


class _CompiledSweeps:
    """A cache of compiled sweeps, by the structure of the slice. At most `most`, with weak references to functions.

    A structure is compiled when it occurs for the second time (or with `at_once`). Compiling would be wasted on a sweep
    that runs only once, or that contains a function which is created anew every time. The compiled function reads the
    current slice from `_at_hand` while JAX traces it, for every new shape, so it keeps no slice alive.
    """

    def __init__(self, most):
        self.most = most
        self._entries = collections.OrderedDict()
        self._lock = threading.Lock()
        self._at_hand = threading.local()

    def run(self, mode, part, arrays, vectors, at_once=False):
        compiled = self._find(mode, part, at_once)
        if compiled is None:
            return mode(part, arrays, vectors)
        self._at_hand.part = part
        try:
            return compiled(arrays, vectors)
        finally:
            self._at_hand.part = None

    def _find(self, mode, part, at_once):
        try:
            key = (mode, _structure(part))
        except TypeError:
            return None
        with self._lock:
            met = at_once or key in self._entries
            compiled = self._entries.pop(key, None)
            if met and compiled is None:
                compiled = jax.jit(lambda arrays, vectors: mode(self._at_hand.part, arrays, vectors))
            self._entries[key] = compiled
            if len(self._entries) > self.most:
                self._entries.popitem(last=False)
        return compiled

    def entries(self):
        """The entries, oldest first: a compiled function, or None for a structure that has occurred once."""
        return list(self._entries.values())

    def clear(self):
        with self._lock:
            self._entries.clear()


compiled_sweeps = _CompiledSweeps(most=256)


def _structure(part):
    """A hashable key of everything except the arrays. Raises `TypeError` if some parameter cannot be hashed."""
    steps = tuple((*_weak_operation(step.operation), *step[1:]) for step in part.steps)
    key = (steps, len(part.inputs), tuple(part.target_slots))
    hash(key)
    return key


def _weak_operation(operation):
    if operation.rule is not None:
        return operation.primitive, operation.rule, len(operation.differentiable)
    if operation.primitive.name == "call_hi_primitive":
        raise TypeError("The rules of a high-level primitive are Python, which may change.")
    parameters = tuple((name, _weak(operation.params[name])) for name in sorted(operation.params))
    return operation.primitive, _weak(operation.subfuns), parameters


def _weak(value):
    """Returns what represents a parameter in a key. It keeps no function alive."""
    if isinstance(value, tuple):
        return tuple(_weak(v) for v in value)
    if isinstance(value, WrappedFun):
        return weakref.ref(value.f), _transforms(value), value.in_type
    if isinstance(value, types.FunctionType):
        return weakref.ref(value)
    if isinstance(value, ClosedJaxpr):
        text = _texts.get(value)
        if text is None:
            text = _texts[value] = jaxprs.text_of(value)
        return text or weakref.ref(value)
    return value


def _transforms(fun):
    """The transformations of a function with a custom derivative, for a key.

    Some contain functions that are created anew at every call. For JAX's own functions (relu) these make no difference
    and are left out. For all others they stay, so that a function that closes over changing state is never found in the
    cache: its program would have the former state compiled in.
    """
    if not getattr(fun.f, "__module__", "").startswith("jax."):
        return fun.transforms
    return tuple(
        (transform, tuple(None if isinstance(p, types.FunctionType) else p for p in parameters))
        for transform, parameters in fun.transforms
    )


# `lax.scan` and similar functions make a new program at every call, but its text stays the same.
_texts = weakref.WeakKeyDictionary()
