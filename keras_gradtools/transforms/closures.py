"""What a function's Python has around it: a compiled program of it holds only as long as that stays the same."""

import dis
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import keras

_LIBRARIES = {"jax", "keras", "numpy", "tensorflow", "torch"}
_PRIMITIVES = (bool, int, str, bytes, type(None))
_CONTAINERS = (tuple, list, dict, set, frozenset)
# A program of what has more around it than this is not kept.
_MOST = 1000


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

    Keras variables are inputs of a program, so that what they hold is not in the key. Of containers, the layers and
    functions in them are; of layers and models, what decides by which rules they are called. What else is changed in
    place (an attribute, an entry of a list) is not seen.

    Raises `TypeError` where there is too much of it.
    """
    found, seen = [], set()
    _collect(fun, found, seen)
    return tuple(found)


def _collect(x, found, seen):
    if isinstance(x, (float, complex)):
        found.append((type(x), repr(x)))  # 0.0 == -0.0
        return
    if isinstance(x, _PRIMITIVES):
        found.append((type(x), x))
        return
    if not isinstance(x, types.MethodType):  # made anew each time that it is looked up
        found.append(Identity(x))
    if id(x) in seen or isinstance(x, (types.ModuleType, type, types.BuiltinFunctionType)):
        return
    if len(seen) > _MOST:
        raise TypeError("There is too much around the function.")
    seen.add(id(x))
    if isinstance(x, keras.Layer):
        found.append(tuple(map(_rules_of, x._flatten_layers())))
    for part in _parts(x):
        _collect(part, found, seen)


def _rules_of(layer):
    return layer.trainable, getattr(layer, "lora_enabled", False), getattr(layer, "quantization_mode", None)


def _parts(x):
    if isinstance(x, types.MethodType):
        return [x.__self__, x.__func__]
    if isinstance(x, functools.partial):
        return [x.func, *x.args, *x.keywords.values()]
    if type(x) in _CONTAINERS:
        inside = x.values() if type(x) is dict else x
        # The numbers in a tuple stay what they are; those in a list may be a counter of calls.
        return [p for p in inside if type(x) is tuple or isinstance(p, (keras.Layer, types.FunctionType, *_CONTAINERS))]
    if isinstance(x, keras.Layer):
        return [] if _library(type(x).call) in _LIBRARIES else [type(x).call]
    if not isinstance(x, types.FunctionType):
        call = vars(type(x)).get("__call__")
        return [call] if isinstance(call, types.FunctionType) else []
    library = _library(x)
    if library in _LIBRARIES:
        return []
    parts = [*(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()]
    loaded, stored = _names(x.__code__)
    cells = zip(x.__code__.co_freevars, x.__closure__ or (), strict=True)
    # What the function assigns itself, such as a counter of its calls, tells nothing of its surroundings.
    parts += [cell.cell_contents for name, cell in cells if name not in stored and _is_filled(cell)]
    if library != "keras_gradtools":
        parts += [x.__globals__[name] for name in sorted(loaded) if name in x.__globals__ and name not in stored]
    return parts


def _library(fun):
    return getattr(fun, "__globals__", {}).get("__name__", "").split(".")[0]


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
    return frozenset(loaded), frozenset(stored)


def _is_filled(cell):
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
