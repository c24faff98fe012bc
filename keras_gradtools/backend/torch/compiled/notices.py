"""What a recorder is told, because torch's modes do not see it.

Keras makes and assigns variables by functions that do not read them, and torch's random generators have a state that
is set without an operation.
"""

import functools
import threading
from typing import Any

from keras_gradtools.keras_internals.variables import direct_assign, initialize


class _Thread(threading.local):
    recorder: Any = None


_thread = _Thread()


def current():
    """The recorder that is recording on this thread, or None."""
    return _thread.recorder


def become_current(recorder):
    """Lets `recorder`, or None, be the one that is recording on this thread."""
    _thread.recorder = recorder


def install():
    initialize.replace(_noted)
    direct_assign.replace(_with_variable)


def _noted(original):
    @functools.wraps(original)
    def _initialize(self, value):
        original(self, value)
        if _thread.recorder is not None:
            _thread.recorder.makes_variables = True

    return _initialize


def _with_variable(original):
    # From Keras 3.16 on, an assignment does not read the variable.
    @functools.wraps(original)
    def _direct_assign(self, value):
        if _thread.recorder is not None and self._value is not None:
            _thread.recorder.note_variable(self, self._value)
        return original(self, value)

    return _direct_assign


def seen_random_state(read):
    """`read()`, the states of the host's and the device's generator, as an operation of a recorder."""
    current = _thread.recorder
    return read() if current is None else current.read_random_state(read)


def seen_setting(write, state):
    """`write(*state)`, which sets the states of these generators, as an operation of a recorder."""
    current = _thread.recorder
    if current is None:
        write(*state)
    else:
        current.write_random_state(write, state)
