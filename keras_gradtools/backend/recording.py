"""Which tapes are recording on this thread, and the Keras variables that they see being read.

`Variable.value` passes every value it hands out through
`Variable._maybe_autocast`, on all backends, inside stateless scopes too, so wrapping that one method
shows every read of every variable. `tests/backend/test_recording.py` pins it.
"""

import threading

from keras_gradtools.backend.blocks import Block
from keras_gradtools.backend.state import is_assigned_in_scope
from keras_gradtools.keras_internals.variables import Variable, autocast


class _Thread(threading.local):
    def __init__(self):
        self.tapes = []
        self.logs = []


_thread = _Thread()


def active_tapes():
    """The tapes that are recording on this thread, outermost first."""
    return list(_thread.tapes)


def is_recording():
    """Whether anything on this thread is to see what is read."""
    return bool(_thread.tapes or _thread.logs)


def is_logging_reads():
    """Whether a `ReadLog` is open on this thread, as where a function is traced that tapes may record later."""
    return bool(_thread.logs)


def note_custom_gradient():
    """Tells what is recording on this thread that a custom gradient is a part of it."""
    for recorder in (*_thread.tapes, *_thread.logs):
        recorder.has_custom_gradient = True


class unseen(Block):  # noqa: N801 - said of a block
    """A block that nothing that is recording on this thread sees."""

    def __init__(self):
        self._around = _thread.tapes, _thread.logs

    def begin(self):
        _thread.tapes, _thread.logs = [], []

    def end(self):
        _thread.tapes, _thread.logs = self._around


class Recording(Block):
    """What the tapes of all backends share: their place among the active tapes, and what they watch.

    A backend's `Tape` derives from it, adds `watch(tensor)` and, where the framework needs to be told,
    its own part of the life cycle:

    - `begin`/`end` bracket the block (see `Block`), and may bracket another one later;
    - `pause`/`resume` bracket a part of it that is not to be recorded;
    - `reset` throws away what was recorded, and everything watched;
    - `release` says that no derivative will be asked for until the next `reset`.

    `keeps_graph` says whether more derivatives may follow the next one; torch can free what it needs on the way.
    `has_custom_gradient` says whether a custom gradient was recorded, so that a Hessian may not be symmetric.

    A variable stands for the values that its readers were given: one on TensorFlow and torch, one alias
    for each assigned value on JAX, more where a stateless scope lends it others.
    """

    def __init__(self, watch_accessed_variables):
        self._watch_accessed_variables = watch_accessed_variables
        self._asked_for = {}
        self._read = {}
        self.has_custom_gradient = False
        self.keeps_graph = True

    def begin(self):
        _thread.tapes.append(self)

    def end(self):
        while self in _thread.tapes:
            _thread.tapes.remove(self)

    def pause(self):
        Recording.end(self)

    def resume(self):
        if self not in _thread.tapes:
            _thread.tapes.append(self)

    def reset(self):
        self._asked_for = {}
        self._read = {}

    def release(self):
        """Lets go of the memory that only derivatives need; the watched variables stay known."""

    def watch_variable(self, variable):
        """Asks for `variable`: it counts as watched now, and its reads are seen even if it is frozen."""
        self._asked_for[id(variable)] = variable

    def wants(self, variable):
        # Keras' flag decides, at the time of the read: a framework's own flag goes stale when a layer is frozen.
        return id(variable) in self._asked_for or (self._watch_accessed_variables and variable.trainable)

    def note_read(self, variable, value, is_lent=False):
        """Remembers that a reader of `variable` was given `value`; `is_lent` if a stateless scope put it there."""
        self._read.setdefault(id(variable), (variable, {}))[1][id(value)] = (value, is_lent)

    def note_results(self, results):
        """Is told, while it is recording, of what derivatives will be asked, tensors or whatever they are instead."""

    def values_read(self, variable):
        """The values that readers of `variable` were given, each once.

        Not those that were computed from another one of them and lent to it: the gradient by that one counts them.
        """
        _, values = self._read.get(id(variable), (None, {}))
        every = [value for value, _ in values.values()]
        if len(every) < 2:
            return every
        kept = []
        for value, is_lent in values.values():
            if not is_lent or not self.depends(value, [v for v in every if v is not value]):
                kept.append(value)
        return kept

    def depends(self, value, others):
        """Whether `value` was computed, while this tape was recording, from one of `others`; each backend's own."""
        raise NotImplementedError

    def watched_variables(self):
        watched = {**self._asked_for, **{key: variable for key, (variable, _) in self._read.items()}}
        return list(watched.values())

    def spread(self, sources, per_source):
        """Replaces each variable among `sources` by its values, and repeats its entry of `per_source` for each."""
        owners, values, entries = [], [], []
        for owner, (source, entry) in enumerate(zip(sources, per_source, strict=True)):
            for value in self.values_read(source) if isinstance(source, Variable) else [source]:
                owners.append(owner)
                values.append(value)
                entries.append(entry)
        return owners, values, entries

    def gather(self, sources, gradient_of):
        """Maps `gradient_of(values) -> gradients` over `sources`, summed over the values of each variable."""
        owners, values, _ = self.spread(sources, sources)
        gathered = [None] * len(sources)
        for owner, gradient in zip(owners, gradient_of(values), strict=True):
            if gradient is not None:
                gathered[owner] = gradient if gathered[owner] is None else gathered[owner] + gradient
        return gathered


class ReadLog(Block):
    """Lists the variables that are read inside its block, on this thread, in the order of their first read.

    It notes as well whether a custom gradient is called there.
    """

    def __init__(self):
        self._seen = {}
        self.has_custom_gradient = False

    @property
    def variables(self):
        return list(self._seen.values())

    def note(self, variable, value):
        """Notes that a reader of `variable` was given `value`."""
        self._seen.setdefault(id(variable), variable)

    def begin(self):
        _thread.logs.append(self)

    def end(self):
        while self in _thread.logs:
            _thread.logs.remove(self)


def is_lent(variable, value):
    """Whether `value` is that of `variable` only because a stateless scope was given it so."""
    return value is not variable._value and not is_assigned_in_scope(variable)


def install_read_hook(watch_read, meet=None):
    """Lets `watch_read(variable, value, tapes) -> value` see every read that some active tapes want.

    It returns what the reader is to be given, and notes that on each of the tapes. `meet(variable)` sees every read.
    """

    def seen(autocast_only):
        def _maybe_autocast(self, value):
            if meet is not None:
                meet(self)
            for log in _thread.logs:
                log.note(self, value)
            if _thread.tapes:
                tapes = [tape for tape in _thread.tapes if tape.wants(self)]
                if tapes:
                    value = watch_read(self, value, tapes)
            return autocast_only(self, value)

        return _maybe_autocast

    autocast.replace(seen)
