"""The tape on JAX, which has none of its own: `trace.py` records operations on it, and `slices.py` reads it."""

import typing
import weakref

from jax._src.array import ArrayImpl

from keras_gradtools.backend.jax import aliases, current_trace, slices, trace
from keras_gradtools.keras_state import numpy_calls, recording


class Tape(recording.Recording):
    """A list of recorded operations, and the values that the tape follows, by identity."""

    # Only set inside the block: a trace that is kept longer would keep a whole compilation alive.
    trace: typing.Any = None

    def __init__(self, watch_accessed_variables):
        super().__init__(watch_accessed_variables)
        self._forget()

    def _forget(self):
        self.operations = []
        self.followed = {}
        self.aliases = {}

    def begin(self):
        super().begin()
        self.trace = current_trace.trace_here()
        current_trace.enter(self.trace, self)
        self.trace.tapes.append(self)

    def end(self):
        super().end()
        if self.trace is not None:
            self._leave_record()
            current_trace.leave(self.trace, self)
            self.trace = None

    def _leave_record(self):
        while self in self.trace.tapes:
            self.trace.tapes.remove(self)

    def pause(self):
        super().pause()
        self._leave_record()

    def resume(self):
        super().resume()
        if self not in self.trace.tapes:
            self.trace.tapes.append(self)

    def reset(self):
        super().reset()
        self._forget()

    def release(self):
        self._forget()

    def watch(self, tensor):
        self.followed[id(tensor)] = tensor

    def depends(self, value, others):
        return bool(slices.Slice(self, [value], others).inputs)


def _watch_read(variable, value, tapes):
    """Returns an alias of `value` to the reader.

    Tapes follow values by identity, so without an alias two variables with the same array could not be told apart. The
    next read of the same value returns the same alias, if all the tapes have it.
    """
    tapes = [tape for tape in tapes if current_trace.is_visible(value, tape.trace)]
    if not tapes or not aliases.is_followable(value):
        return value
    known = [tape.aliases.get(id(variable), (None, None)) for tape in tapes]
    given = known[0][1]
    # If a stateless scope maps the variable to a value that some tape follows, that tape must follow the alias, too.
    # An assigned value is a constant, whatever it was computed from.
    is_lent = recording.is_lent(variable, value)
    followers = [tape for tape in recording.active_tapes() if is_lent and id(value) in tape.followed]
    if (
        given is None
        or any(of is not value or alias is not given for of, alias in known)
        or any(id(given) not in tape.followed for tape in followers)
    ):
        given = aliases.recorded_alias(value, followers[-1].trace) if followers else aliases.alias(value)
    if current_trace.is_tracing_program() and not current_trace.is_traced([given]):
        _note_read_by_program(variable, given)
    for tape in tapes:
        tape.aliases[id(variable)] = (value, given)
        tape.followed[id(given)] = given
        tape.note_read(variable, given, is_lent)
    return given


def _note_read_by_program(variable, given):
    """Lets later tapes know that `given`, a constant of a traced program, is the value of `variable`."""
    key, owner = id(given), weakref.ref(variable)

    def read(given, tapes):
        variable = owner()
        for tape in tapes:
            if variable is not None and id(given) not in tape.followed and tape.wants(variable):
                tape.followed[id(given)] = given
                tape.note_read(variable, given)

    trace.reads_by_programs[key] = read
    weakref.finalize(given, trace.reads_by_programs.pop, key, None).atexit = False


def _is_recorded(array):
    return any(id(array) in tape.followed for tape in recording.active_tapes())


def install():
    recording.install_read_hook(_watch_read)
    numpy_calls.install(ArrayImpl, _is_recorded)
