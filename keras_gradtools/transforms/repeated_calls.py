"""A short way to the compiled program of a transform, for a call that repeats the last one.

To find a program, all captured values of the function and the structure of the arguments are compared. For a small
model that takes as long as the program runs. A repeated call checks only what can have changed since the last one.
"""

from typing import Any

import numpy as np
from keras import ops

from keras_gradtools import nesting
from keras_gradtools.keras_state import layer_state
from keras_gradtools.transforms import compiled
from keras_gradtools.transforms.guards import Guards


class RepeatedCalls:
    """`compiled.run` for one function. It holds the function and the values that it captures."""

    def __init__(self, name, fun):
        self._name = name
        self._fun = fun
        self._last: Any = None
        self._repeated: _Repeated | None = None

    def run(self, body, options, args, kwargs):
        """As `compiled.run`."""
        repeated = self._repeated
        if repeated is not None:
            found = repeated.run(options, args, kwargs)
            if found is not None:
                return found
            self._repeated = self._last = None

        def note(programs, program, key):
            # The second time: a function that is called differently each time would not repay the guards.
            if program is self._last:
                self._repeated = _repeated(self._fun, programs, program, key, options, args, kwargs)
            self._last = program

        return compiled.prepare(self._name, self._fun, body, options, args, kwargs, note)(args, kwargs)


def _repeated(fun, programs, program, key, options, args, kwargs):
    """What a call must have in common with this one. None if its arguments are not all tensors, flags or None."""
    repeat, kinds = None, None
    given = [*args, *kwargs.values()]
    if program.repeat is not None and not kwargs and all(map(_is_array, nesting.flatten(args))):
        repeat = program.repeat
    elif all(_is_array(x) or type(x) in _FLAGS for x in given):
        kinds = len(args), tuple(kwargs), list(map(_kind, given))
    else:
        return None
    guards = Guards()
    if programs.captured_values(fun, guards).key != key.captured_values:
        return None
    return _Repeated(program, options, key.ambient, guards, repeat, kinds)


# There is only one object for each of their values.
_FLAGS = (bool, type(None))


def _is_array(x):
    # A variable has to be read.
    return type(x) is np.ndarray or ops.is_tensor(x)


def _kind(x):
    return (None, x, None) if type(x) in _FLAGS else (type(x), x.shape, x.dtype)


class _Repeated:
    def __init__(self, program, options, ambient, guards, repeat, kinds):
        self._program = program
        self._options = options
        self._ambient = ambient
        self._guards = guards
        self._repeat = repeat
        self._kinds = kinds

    def run(self, options, args, kwargs):
        """What the program returns for these arguments. None if the call is not a repetition, or must not use it."""
        program = self._program
        if not (
            compiled.may_run()
            and options == self._options
            and layer_state.ambient() == self._ambient
            and program.refusal is None
            and self._guards.hold()
        ):
            return None
        if self._repeat is not None:
            found = None if kwargs else self._repeat(args)
            return found and (found[0], program.note)
        return program(*args, **kwargs) if self._has_same_kinds(args, kwargs) else None

    def _has_same_kinds(self, args, kwargs):
        count, names, kinds = self._kinds
        if len(args) != count or tuple(kwargs) != names:
            return False
        for x, (kind, shape, dtype) in zip((*args, *kwargs.values()), kinds, strict=True):
            if kind is None:
                if x is not shape:
                    return False
            elif type(x) is not kind or x.shape != shape or x.dtype != dtype or layer_state.has_keras_mask(x):
                return False
        return True
