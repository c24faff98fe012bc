"""`jax.jit` for functions that read and assign Keras variables.

Plain `jax.jit` compiles the values of variables in as constants, and leaves tracers in variables that are assigned.
Here each variable that is read becomes an input, and each new value an output that is then assigned to the variable.
"""

import collections
import functools
from typing import Any

import jax
import keras
import numpy as np
from jax._src.array import ArrayImpl

from keras_gradtools import nesting
from keras_gradtools.backend import causes
from keras_gradtools.keras_internals.variables import AutocastScope, Variable, initialize_all_variables
from keras_gradtools.keras_state import recording, scopes
from keras_gradtools.keras_state.layer_state import has_keras_mask
from keras_gradtools.keras_state.scopes import StateScope


class _Program:
    """A function compiled for one structure of its arguments, their shapes and dtypes, and its static arguments."""

    def __init__(self, fun, outline, structure, static):
        self._fun = fun
        self._outline = outline
        self._structure = structure
        self._static = static
        self._outline_of_result: Any = None
        self._read: Any = None
        # Whether no class of these variables has its own way of reading the value.
        self._reads_plainly = False
        self._assigned: list = []
        self._compiled = jax.jit(self._run)

    def __call__(self, arrays):
        if self._read is None:
            self._read = self._find_state(arrays)
            self._reads_plainly = all(type(v).value is Variable.value for v in self._read)
        result, assigned = self._compiled(self._values(), arrays)
        if assigned:
            self._assign(assigned)
        return self._outline_of_result.pack(result)

    def _values(self):
        """The values of the variables, not autocast."""
        # A shortcut if no tape or scope needs to see the reads: reading through Keras takes microseconds per variable.
        if self._reads_plainly and not (recording.is_recording() or scopes.in_scope()):
            values = [v._value for v in self._read]
            if all([value is not None for value in values]):
                return values
        with AutocastScope(None):
            return [v.value for v in self._read]

    def _assign(self, assigned):
        before = [v._value for v in self._assigned]
        in_scope = scopes.in_scope()
        try:
            for variable, value in zip(self._assigned, assigned, strict=True):
                if in_scope:
                    variable.assign(value)
                else:
                    # Its shape and dtype are right, since it was assigned while the program was traced.
                    variable._direct_assign(value)
        except BaseException:
            # All assignments of a step or, after an interrupt, none.
            for variable, value in zip(self._assigned, before, strict=True):
                variable._value = value
            raise

    def _find_state(self, arrays):
        """Traces once without compiling, to find the variables that are read, and initializes new variables.

        In a stateless scope, they are initialized when the scope ends.
        """
        read = []
        jax.eval_shape(lambda arrays: self._run([], arrays, read)[0], arrays)
        if not scopes.in_scope():
            initialize_all_variables()
        return read

    def _run(self, values, arrays, read=None):
        given = iter(arrays)
        leaves = [next(given) if leaf is _ARRAY else leaf for leaf in self._static]
        args, kwargs = self._outline.pack(jax.tree.unflatten(self._structure, leaves))
        scope = StateScope(zip(self._read or [], values, strict=True))
        with scope, scope:
            result = self._fun(*args, **kwargs)
        self._assigned = scope.variables_assigned
        if read is not None:
            read.extend(scope.variables_read)
        self._outline_of_result = nesting.outline(result)
        result = [x.value if isinstance(x, keras.Variable) else x for x in nesting.flatten(result)]
        return result, [scope.get_current_value(v) for v in self._assigned]


# At most this many cached programs per function, for different shapes, dtypes and constants.
_MOST_PROGRAMS = 256


class _Array:
    def __repr__(self):
        return "array"


_ARRAY = _Array()


def jit(fun, compiler=None):
    programs = collections.OrderedDict()
    last: Any = (None, None, ())

    def repeat(args):
        """The result for arguments like those of the last call, as a list of one. See `Backend.jit`."""
        program, structure, types = last
        if program is None:
            return None
        # JAX itself compares structures and types fastest.
        arrays, given = jax.tree.flatten(args)
        if given != structure or [_type_of(x) for x in arrays] != types:
            return None
        return None if any(map(has_keras_mask, arrays)) else [program(arrays)]

    @functools.wraps(fun)
    def call(*args, **kwargs):
        nonlocal last
        found = None if kwargs else repeat(args)
        if found is not None:
            return found[0]
        outline, flat = nesting.split((args, kwargs))
        # JAX flattens leaves further: a sparse array consists of several arrays.
        leaves, structure = jax.tree.flatten(flat, is_leaf=_is_none)
        arrays: list[Any] = []
        static, constants = [], []
        for x in leaves:
            if isinstance(x, (jax.Array, np.ndarray, np.generic, float)):
                arrays.append(x)
                static.append(_ARRAY)
            else:
                static.append(x)
                # True == 1 == 1.0 in Python, but not to a function that branches on them.
                constants.append((len(arrays), type(x), id(x) if isinstance(x, keras.Variable) else x))
        # The function may branch on shapes and dtypes, too.
        key = (outline, structure, tuple(constants), tuple([jax.typeof(x) for x in arrays]))
        program = programs.get(key)
        if program is None:
            program = programs[key] = _Program(fun, outline, structure, static)
            if len(programs) > _MOST_PROGRAMS:
                programs.popitem(last=False)
        result = program(arrays)
        # To JAX, None is a part of the structure.
        types, is_constant = [_type_of(x) for x in arrays], any(x is not None for *_, x in constants)
        is_plain = not (kwargs or is_constant) and _is_plain(outline.node) and None not in types
        last = (program, jax.tree.structure(args), types) if is_plain else (None, None, ())
        return result

    jitted: Any = call
    jitted.repeat = repeat
    return jitted


def _type_of(x):
    """What the program of an array depends on. None if it is neither an array of JAX nor one of NumPy."""
    if type(x) is ArrayImpl:
        return x.aval
    return (x.shape, x.dtype) if type(x) is np.ndarray else None


def _is_plain(node):
    """Whether a structure consists of lists and tuples only. JAX ignores the order of the keys of a dict."""
    return node is None or node[0] in (list, tuple, dict) and not node[1] and all(map(_is_plain, node[2]))


def _is_none(x):
    return x is None


_VALUE_ERRORS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.UnexpectedTracerError,
)


def depends_on_values(error):
    # Keras' refusal to draw random numbers without a seed ("[JAX RNG]") occurs only inside a trace. An `AttributeError`
    # comes from a method that arrays have and tracers do not.
    return any(
        isinstance(e, _VALUE_ERRORS) or "[JAX RNG]" in str(e) or isinstance(e, AttributeError) and "Tracer" in str(e)
        for e in causes.of(error)
    )
