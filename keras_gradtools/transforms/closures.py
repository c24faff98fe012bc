"""What a function's Python has around it: a compiled program of it holds only as long as that stays the same."""

import dis
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import keras

_LIBRARIES = {"jax", "keras", "numpy", "tensorflow", "torch"}
_MOST = 200


class Identity:
    """Stands for an object in a key: equal for the same object only, and holding it weakly where that can be."""

    __slots__ = ("_hash", "_object")

    def __init__(self, x):
        self._hash = id(x)
        self._object: Callable[[], Any]
        try:
            self._object = weakref.ref(x)
        except TypeError:
            self._object = lambda: x

    def __hash__(self):
        return self._hash

    def __eq__(self, other):
        mine = self._object()
        return isinstance(other, Identity) and mine is not None and mine is other._object()


def surroundings(fun):
    """A key of what `fun` closes over, its defaults and the globals that it names, through the functions among them.

    Keras variables are inputs of a program, so that what they hold is not in the key. What is changed in place (an
    attribute, an entry of a list) is not seen; but for the `trainable` of layers, by which BatchNormalization goes.
    """
    found, seen = [], set()
    _collect(fun, found, seen)
    return tuple(found)


def _collect(x, found, seen):
    if isinstance(x, (bool, int, float, complex, str, bytes, type(None))):
        found.append((type(x), x))
        return
    if not isinstance(x, types.MethodType):  # made anew each time that it is looked up
        found.append(Identity(x))
    if id(x) in seen or len(seen) > _MOST:
        return
    seen.add(id(x))
    for part in _parts(x):
        if not isinstance(part, (types.ModuleType, type, types.BuiltinFunctionType)):
            _collect(part, found, seen)


def _parts(x):
    if isinstance(x, types.MethodType):
        return [x.__self__, x.__func__]
    if isinstance(x, functools.partial):
        return [x.func, *x.args, *x.keywords.values()]
    if isinstance(x, keras.Layer):
        return [x.trainable, *getattr(x, "layers", ())]
    if type(x) is tuple:
        return x
    if not isinstance(x, types.FunctionType):
        return []
    library = x.__globals__.get("__name__", "").split(".")[0]
    if library in _LIBRARIES:
        return []
    parts = [*(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()]
    loaded, stored = _names(x.__code__)
    cells = zip(x.__code__.co_freevars, x.__closure__ or (), strict=True)
    # What the function assigns itself, such as a counter of its calls, tells nothing of its surroundings.
    parts += [cell.cell_contents for name, cell in cells if name not in stored and _is_filled(cell)]
    if library != "keras_gradtools":
        parts += [x.__globals__[name] for name in loaded if name in x.__globals__ and name not in stored]
    return parts


@functools.lru_cache(maxsize=1024)
def _names(code):
    """The globals that a piece of code, and what is defined in it, looks up; and all outer names that it assigns."""
    instructions = list(dis.get_instructions(code))
    loaded = {i.argval for i in instructions if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    stored = {i.argval for i in instructions if i.opname in ("STORE_GLOBAL", "STORE_DEREF")}
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            inner_loaded, inner_stored = _names(inner)
            loaded, stored = loaded | inner_loaded, stored | inner_stored
    return sorted(loaded), stored


def _is_filled(cell):
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
