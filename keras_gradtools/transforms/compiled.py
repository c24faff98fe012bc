"""Cached compilation of transforms: one program for each function, its captured values, shapes and dtypes."""

import collections
import functools
import threading
import types
import warnings
import weakref
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_gradtools import backend, nesting, validation
from keras_gradtools.backend import causes
from keras_gradtools.keras_state import layer_state, scopes
from keras_gradtools.keras_state.scopes import read
from keras_gradtools.transforms import closures
from keras_gradtools.transforms.guards import Guards

MOST_PROGRAMS = 64
# The most programs of one function that differ only in the captured values.
MOST_BY_CAPTURED_VALUES = 4


class Program:
    """`body(fun, ...)` compiled for one signature.

    `body` returns its result and a note, which holds what Python learns only during tracing. `fun` is held weakly,
    because it is needed only during tracing, when the caller holds it.
    """

    def __init__(self, fun, body):
        reference = weakref.WeakMethod(fun) if isinstance(fun, types.MethodType) else _reference(fun)

        def traced(*args, **kwargs):
            result, self.note = body(reference(), *args, **kwargs)
            return result

        self.note = None
        self.ran = False
        self._compiled = backend.jit(traced)
        # A faster way to call it again, if the backend has one.
        self.repeat = getattr(self._compiled, "repeat", None)

    @property
    def refusal(self):
        """Why `fun` was not compiled but ran eagerly, or None."""
        return getattr(self._compiled, "refusal", None)

    def __call__(self, *args, **kwargs):
        result = self._compiled(*args, **kwargs)
        self.ran = True
        return result, self.note


class _Key(NamedTuple):
    options: Any
    ambient: Any
    signature: Any
    captured_values: Any


class Programs:
    """The cached programs of one function, at most `MOST_PROGRAMS`, with the most recently used one last."""

    def __init__(self):
        self.by_key = collections.OrderedDict()
        self.lock = threading.Lock()
        self._has_warned = False
        # Labels of captured values that the function changes itself, such as a list that it appends to.
        self._ignored = frozenset()
        self._last = None
        self._guarded = None
        # For a repeated call: the program of the last call, the context of that, and the guards that must hold.
        self._repeated = None

    def captured_values(self, fun, guards=None):
        return closures.captured_values(fun, self._ignored, guards=guards)

    def guarded_captured_values(self, fun):
        """As `captured_values`, but faster if nothing has changed. Holds the function and the values strongly."""
        if self._guarded is not None and self._guarded[0].hold():
            return self._guarded[1]
        self._guarded = self._repeated = None
        guards = Guards()
        found = self.captured_values(fun, guards)
        self._guarded = guards, found
        return found

    def repeat(self, args):
        """The result of the program of the last call, as a list of one, if this call repeats it. Otherwise None."""
        repeated = self._repeated
        if repeated is None:
            return None
        program, ambient, guards = repeated
        return program.repeat(args) if layer_state.ambient() == ambient and guards.hold() else None

    def note_call(self, program, key, captured):
        """Lets `repeat` use `program` while `captured`, from `guarded_captured_values`, is up to date."""
        guarded = self._guarded
        # Otherwise another thread has called the function with other captured values in the meantime.
        if guarded is not None and guarded[1] is captured and hasattr(program, "repeat"):
            self._repeated = program, key.ambient, guarded[0]
        else:
            self._repeated = None

    def get(self, key, make):
        last = self._last
        if last is not None and last[0] == key:
            return last[1]  # the usual case; hashing a key takes longer
        with self.lock:
            program = self.by_key.pop(key, None)
            if program is None:
                self._forget_former_captured_values(key)
                program = make()
            self.by_key[key] = program
            if len(self.by_key) > MOST_PROGRAMS:
                self.by_key.popitem(last=False)
            self._last = (key, program)
        return program

    def _forget_former_captured_values(self, key):
        # A program holds the arrays that its function closed over when it was traced, so only few are cached.
        former = [k for k in self.by_key if k[:-1] == key[:-1]]
        for k in former[: max(len(former) - MOST_BY_CAPTURED_VALUES + 1, 0)]:
            del self.by_key[k]

    def has_traced(self, fun, key, before):
        """Moves a new program to the key that the next call will use, if tracing has changed the captured values.

        `before` are the captured values before the trace. From now on, what the trace has changed is ignored.
        """
        after = self.captured_values(fun)
        if after.key == before.key:
            return
        with self.lock:
            self._ignored |= after.changed_since(before)
            self._guarded = self._repeated = None
            program = self.by_key.pop(key, None)
            if program is not None:
                self._last = None
                self.by_key[key._replace(captured_values=self.captured_values(fun).key)] = program

    def warn_once(self, name, fun, reason, error=None):
        if self._has_warned:
            return
        self._has_warned = True
        if error is not None:
            reason = f"{reason} The error was: {_words_of(error)}"
        warnings.warn(f"`{name}` runs {validation.name_of(fun)} eagerly, which is slower: {reason}", stacklevel=6)

    def replace(self, key, program):
        with self.lock:
            self._last = None
            self.by_key[key] = program

    def discard(self, key):
        with self.lock:
            self._last = None
            self.by_key.pop(key, None)


_DEPENDS_ON_VALUES = (
    "it cannot be compiled, because its Python code depends on the values of tensors. Use `keras.ops.where` or "
    "`keras.ops.cond` instead of `if`, and do not call `float(x)` or NumPy."
)


def _refused(reason):
    return f"its operations cannot be recorded, because {reason}."


_TOO_MUCH = (
    "its compiled program cannot be cached, because the function and those that it calls capture more values than can "
    "be compared at each call. Pass them as arguments instead."
)
_HAS_MASK = (
    "an argument has a Keras mask, which a compiled program would not see. Pass the mask as an argument of its own."
)
_functions: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def may_run():
    """Whether a compiled program may be used at this point."""
    return backend.may_compile() and not scopes.is_overridden()


def captured_by(fun, guards=None):
    """A key of the captured values of `fun`, or of a string itself. Raises `TypeError` if there are too many.

    With `Guards`, these then remember where the values were found. They hold the function strongly.
    """
    return fun if isinstance(fun, str) else _programs_of(fun).captured_values(fun, guards).key


def run(name, fun, body, options, args, kwargs):
    """Returns `body(fun, *args, **kwargs)`, a pair of a result and a note, from a cached program. See `prepare`."""
    return prepare(name, fun, body, options, args, kwargs)(args, kwargs)


def prepare(name, fun, body, options, args, kwargs, note_repeated=None):
    """Returns `body(fun, *args, **kwargs)` as a function of `(args, kwargs)`, compiled if possible.

    The function that is returned is valid for arguments of the same structure, shapes and dtypes. It is not compiled
    inside another compilation, on a backend without a compiler, while a scope gives other values to Keras variables, or
    if an argument has a Keras mask.
    If the Python code of `fun` depends on the values of tensors, it cannot be traced: a warning is issued, and `fun`
    runs eagerly from then on. Any other error of a first call is raised, and the next call tries again.

    `options` is part of the cache key. It must differ for each `body` and its constants that have the same `name`.
    `note_repeated(programs, program, key)` is called when a program has run that had run before.
    """

    def eager(args, kwargs):
        return body(fun, *args, **kwargs)

    # A program would not see the mask of an argument.
    if not may_run() or any(map(layer_state.has_keras_mask, nesting.flatten((args, kwargs)))):
        return eager
    try:
        programs, captured, key = _place(name, fun, options, args, kwargs)
    except TypeError:
        return eager
    program = programs.get(key, lambda: Program(fun, body))
    if program is _EAGER:
        return eager

    def compiled(args, kwargs):
        is_new = not program.ran
        if not (is_new or kwargs) and program.repeat is not None and note_repeated is None:
            found = program.repeat(args)
            if found is not None:
                return found[0], program.note
        args, kwargs = nesting.map_structure(_argument, (args, kwargs))
        try:
            result = program(*args, **kwargs)
        except BaseException as error:
            if not is_new or not backend.depends_on_values(error):
                if is_new:
                    programs.discard(key)
                raise
            reason = error
        else:
            if program.refusal is not None:
                programs.replace(key, _EAGER)
                programs.warn_once(name, fun, _refused(program.refusal))
            elif is_new:
                programs.has_traced(fun, key, captured)
            elif note_repeated is not None:
                note_repeated(programs, program, key)
            return result
        # An error that also occurs without the compiler is raised from here, with a shorter traceback.
        result = eager(args, kwargs)
        programs.replace(key, _EAGER)
        programs.warn_once(name, fun, _DEPENDS_ON_VALUES, reason)
        return result

    return compiled


def remembered(name, fun, options, args, kwargs, find):
    """`find()`, or what it returned before for the same function, captured values, structure, shapes and dtypes."""
    try:
        programs, _, key = _place(name, fun, options, args, kwargs)
    except TypeError:
        return find()
    found = programs.by_key.get(key)
    if found is None:
        # Not under the lock of the programs: `find` may call `fun`, which may come here again.
        found = (find(),)
        programs.get(key, lambda: found)
    return found[0]


def _place(name, fun, options, args, kwargs):
    """The programs of `fun`, its captured values, and the key of a call. `TypeError` if there cannot be one."""
    programs = _programs_of(fun)
    captured = programs.captured_values(fun)
    return programs, captured, _Key((name, options), layer_state.ambient(), _signature(fun, args, kwargs), captured.key)


def jitted(fun, compiler=None):
    """`backend.jit(fun, compiler)`, with a program for each signature and the captured values at the time of a call."""
    programs = Programs()

    @functools.wraps(fun, updated=())
    def call(*args, **kwargs):
        found = None if kwargs else programs.repeat(args)
        if found is not None:
            return found[0]
        reads = closures.attributes_read_by(fun)
        leaves = nesting.flatten((args, kwargs) if kwargs else args)
        if any(map(layer_state.has_keras_mask, leaves)):
            programs.warn_once("kg.jit", fun, _HAS_MASK)
            return fun(*args, **kwargs)
        try:
            captured = programs.guarded_captured_values(fun)
            # The compiler itself distinguishes the shapes and dtypes of tensors.
            constants = [
                closures.captured_values(x, reads=reads).key
                for x in leaves
                if not hasattr(x, "dtype") and not isinstance(x, float)
            ]
        except TypeError as error:
            programs.warn_once("kg.jit", fun, _TOO_MUCH, error)
            return fun(*args, **kwargs)
        key = _Key("jit", layer_state.ambient(), tuple(constants), captured.key)
        made = []

        def make():
            made.append(backend.jit(fun, compiler))
            return made[0]

        program = programs.get(key, make)
        try:
            result = program(*args, **kwargs)
        except BaseException as error:
            if made:
                programs.discard(key)
            # Keras' refusal to draw random numbers without a seed, a `ValueError`, says itself what to do.
            if isinstance(error, Exception) and not isinstance(error, ValueError) and backend.depends_on_values(error):
                raise _branches_on_values(fun, error) from error
            raise
        refusal = getattr(program, "refusal", None)
        if refusal is not None:
            programs.warn_once("kg.jit", fun, _refused(refusal))
        elif made:
            programs.has_traced(fun, key, captured)
        else:
            programs.note_call(program, key, captured)
        return result

    return call


def _branches_on_values(fun, error):
    return TypeError(
        f"`kg.jit` cannot compile {validation.name_of(fun)}, because its Python code depends on the values of tensors. "
        "Use `keras.ops.where` or `keras.ops.cond` instead of `if`, and do not call `float(x)` or NumPy. Or pass the "
        f"value as a Python integer, bool or string. The error was: {_words_of(error)}"
    )


def _words_of(error):
    """The class and the first line of `error`, or of the framework's error that Keras' layers have replaced by it."""
    error = [error, *(e for e in causes.of(error) if backend.depends_on_values(e))][-1]
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"


class _Eager:
    """Takes the place of a program if the function cannot be traced."""


_EAGER = _Eager()


def _programs_of(fun):
    owner = fun.__self__ if isinstance(fun, types.MethodType) else fun
    programs = _functions.get(owner)
    if programs is None:
        programs = _functions.setdefault(owner, Programs())
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


def _signature(fun, args, kwargs):
    leaves = nesting.flatten((args, kwargs))
    reads = closures.attributes_read_by(fun)
    return nesting.outline((args, kwargs)), tuple([_leaf(x, reads) for x in leaves])


def _leaf(x, reads):
    if isinstance(x, keras.KerasTensor):
        raise TypeError("A symbolic tensor cannot be an argument of a program.")
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return tuple(x.shape), validation.dtype_of(x)
    if isinstance(x, float):
        return float
    hash(x)  # a constant of the program must be hashable, else this raises TypeError
    return closures.captured_values(x, reads=reads).key
