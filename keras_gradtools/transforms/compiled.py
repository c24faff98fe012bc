"""Transforms that compile themselves: one program for each function, its surroundings, shapes and dtypes."""

import collections
import threading
import types
import warnings
import weakref
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_gradtools import backend, nesting, validation
from keras_gradtools.backend import state
from keras_gradtools.transforms.closures import surroundings
from keras_gradtools.transforms.taped_call import read

MOST_PROGRAMS = 64
# Of these, for the same arguments with something else closed over.
MOST_SURROUNDINGS = 4


class Program:
    """`body(fun, ...)` compiled for one signature.

    `body` returns what it computes and a note of what Python knew when it did. The function is held weakly: it
    is needed while the program is traced, and who calls it has it.
    """

    def __init__(self, fun, body):
        reference = weakref.WeakMethod(fun) if isinstance(fun, types.MethodType) else _reference(fun)

        def traced(*args, **kwargs):
            result, self.note = body(reference(), *args, **kwargs)
            return result

        self.note = None
        self.ran = False
        self._compiled = backend.jit(traced)

    def __call__(self, *args, **kwargs):
        result = self._compiled(*args, **kwargs)
        self.ran = True
        return result, self.note


class _Key(NamedTuple):
    options: Any
    ambient: Any
    signature: Any
    surroundings: Any


class _Programs:
    """The programs of one function: bounded, the one that was used last at the end."""

    def __init__(self):
        self.by_key = collections.OrderedDict()
        self.lock = threading.Lock()
        self._has_warned = False

    def get(self, key, make):
        with self.lock:
            program = self.by_key.pop(key, None)
            if program is None:
                self._forget_former_surroundings(key)
                program = make()
            self.by_key[key] = program
            if len(self.by_key) > MOST_PROGRAMS:
                self.by_key.popitem(last=False)
        return program

    def _forget_former_surroundings(self, key):
        # A program holds the arrays that its function closed over when it was traced.
        former = [k for k in self.by_key if k[:-1] == key[:-1]]
        for k in former[: max(len(former) - MOST_SURROUNDINGS + 1, 0)]:
            del self.by_key[k]

    def warn_once(self, name, fun, error):
        if self._has_warned:
            return
        self._has_warned = True
        first_line = (str(error).strip().splitlines() or [""])[0]
        warnings.warn(
            f"`{name}` runs {validation.name_of(fun)} eagerly, which is slower: it cannot be compiled. Mostly that is "
            "because its Python depends on the values of tensors: use `keras.ops.where` or `keras.ops.cond` instead of "
            f"`if`, and no `float(x)` or NumPy. The compiler said: {type(error).__name__}: {first_line}",
            stacklevel=6,
        )

    def replace(self, key, program):
        with self.lock:
            self.by_key[key] = program


_functions: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def may_run():
    """Whether a program may be used here at all."""
    return backend.may_compile() and not state.is_overridden()


def run(name, fun, body, options, args, kwargs):
    """Returns `body(fun, *args, **kwargs)`, a pair of a result and a note, by a program that is kept: see `prepare`."""
    return prepare(name, fun, body, options, args, kwargs)(args, kwargs)


def prepare(name, fun, body, options, args, kwargs):
    """Returns `body(fun, *args, **kwargs)` as a function of arguments that are like these, compiled where that can be.

    It runs as it is within another compilation, on a backend without a compiler, and where Keras variables stand
    for other values. Where tracing fails and the same Python does not, `fun` is taken to depend on values: it
    runs eagerly from then on, and a warning says so.

    `options` are the constants of `body`, and which of those under this name it is, as a key.
    """

    def eager(args, kwargs):
        return body(fun, *args, **kwargs)

    if not may_run():
        return eager
    try:
        key = _Key((name, options), state.ambient(), _signature(args, kwargs), surroundings(fun))
        programs = _programs_of(fun)
    except TypeError:
        return eager
    program = programs.get(key, lambda: Program(fun, body))
    if program is _EAGER:
        return eager

    def compiled(args, kwargs):
        args, kwargs = nesting.map_structure(_argument, (args, kwargs))
        if program.ran:
            return program(*args, **kwargs)
        try:
            return program(*args, **kwargs)
        except Exception as error:
            # Whatever is wrong without a compiler, too, is raised from here, without its traces.
            result = eager(args, kwargs)
            programs.replace(key, _EAGER)
            programs.warn_once(name, fun, error)
            return result

    return compiled


class _Eager:
    """In the place of a program, for what cannot be traced."""


_EAGER = _Eager()


def _programs_of(fun):
    owner = fun.__self__ if isinstance(fun, types.MethodType) else fun
    programs = _functions.get(owner)
    if programs is None:
        programs = _functions.setdefault(owner, _Programs())
    return programs


def _reference(fun):
    try:
        return weakref.ref(fun)
    except TypeError:
        return lambda: fun


def _argument(x):
    if isinstance(x, float):
        return ops.convert_to_tensor(x, dtype=keras.config.floatx())
    return read(x)


def _signature(args, kwargs):
    leaves = nesting.flatten((args, kwargs))
    return _structure(args), _structure(kwargs), tuple(_leaf(x) for x in leaves)


def _structure(x):
    """The nesting as a key; the leaves have no place in it."""
    if isinstance(x, dict):
        return type(x), tuple((k, _structure(v)) for k, v in sorted(x.items()))
    if isinstance(x, (list, tuple)):
        return type(x), tuple(_structure(v) for v in x)
    return None


def _leaf(x):
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return tuple(x.shape), validation.dtype_of(x)
    if isinstance(x, float):
        return float
    hash(x)  # a constant of the program; TypeError, where it cannot be one
    return surroundings(x)
