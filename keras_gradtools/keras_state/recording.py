"""Keeps track of the tapes that are recording on each thread, and tells them which Keras variables are read.

A tape watches trainable variables when they are read. On all backends, and in stateless scopes, every value that
`Variable.value` returns passes through `Variable._maybe_autocast`, so wrapping this one method shows every read.
`tests/keras_state/test_recording.py` checks this.
"""

import threading

from keras_gradtools.blocks import Block
from keras_gradtools.keras_internals.variables import Variable, autocast
from keras_gradtools.keras_state.scopes import is_assigned_in_scope


class _Thread(threading.local):
    def __init__(self):
        self.tapes = []
        self.logs = []


_thread = _Thread()


def active_tapes():
    """The tapes that are recording on this thread, outermost first."""
    return list(_thread.tapes)


def is_recording():
    """Whether a tape is recording, or a `ReadLog` is open, on this thread."""
    return bool(_thread.tapes or _thread.logs)


def is_logging_reads():
    """Whether a `ReadLog` is open on this thread, as it is while `kg.jit` traces a function on TensorFlow."""
    return bool(_thread.logs)


def note_custom_gradient():
    """Tells the tapes and logs of this thread that a custom gradient was called."""
    for recorder in (*_thread.tapes, *_thread.logs):
        recorder.has_custom_gradient = True


class unseen(Block):  # noqa: N801 - said of a block
    """A block that is hidden from all tapes and logs of this thread."""

    def __init__(self):
        self._around = _thread.tapes, _thread.logs

    def begin(self):
        _thread.tapes, _thread.logs = [], []

    def end(self):
        _thread.tapes, _thread.logs = self._around


class Recording(Block):
    """The base class of the tapes of all backends: it registers active tapes and stores what they watch.

    A backend's `Tape` adds `watch(tensor)` and, where the framework requires it, extends these methods:

    - `begin` and `end` enclose the recorded block (see `Block`), and may enclose another one later.
    - `pause` and `resume` enclose a part of the block that is not recorded.
    - `reset` forgets all recorded operations and everything watched.
    - `release` says that no derivative will be computed until the next `reset`.

    `keeps_graph`: whether more derivatives may follow the next one. If False, torch frees the graph during that one.
    `has_custom_gradient`: whether a custom gradient was recorded, so that a Hessian may not be symmetric.

    The gradient of a variable is the sum over the values that its readers were given. On TensorFlow and torch this is
    one value, and on JAX one alias for each assigned value. If a stateless scope gives the variable other values, there
    are more.
    """

    # Whether `watch` takes a sparse or ragged tensor, and watches the dense tensors that it consists of.
    watches_parts = False

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
        """Frees the memory that only derivatives need. The list of watched variables is kept."""

    def watch_variable(self, variable):
        """Watches `variable` explicitly, even if it is frozen."""
        self._asked_for[id(variable)] = variable

    def wants(self, variable):
        # Keras' flag at the time of the read decides: the framework's own flag is not updated when a layer is frozen.
        return id(variable) in self._asked_for or (self._watch_accessed_variables and variable.trainable)

    def note_read(self, variable, value, is_lent=False):
        """Notes that a reader of `variable` was given `value`. `is_lent`: see the function `is_lent`."""
        self._read.setdefault(id(variable), (variable, {}))[1][id(value)] = (value, is_lent)

    def note_results(self, results):
        """Receives the values that will be differentiated, before the recorded block ends. They need not be tensors."""

    def values_read(self, variable):
        """The distinct values that readers of `variable` were given.

        A value from a stateless scope that was computed from another of them is left out, because the gradient of that
        other value already includes it.
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
        """Whether `value` was computed from one of `others` while this tape was recording."""
        raise NotImplementedError

    def watched_variables(self):
        watched = {**self._asked_for, **{key: variable for key, (variable, _) in self._read.items()}}
        return list(watched.values())

    def spread(self, sources, per_source):
        """Replaces each variable in `sources` by the values read, and repeats its entry of `per_source` for each."""
        owners, values, entries = [], [], []
        for owner, (source, entry) in enumerate(zip(sources, per_source, strict=True)):
            for value in self.values_read(source) if isinstance(source, Variable) else [source]:
                owners.append(owner)
                values.append(value)
                entries.append(entry)
        return owners, values, entries

    def gather(self, sources, gradient_of):
        """Calls `gradient_of(values) -> gradients` for `sources`, and sums over the values of each variable."""
        owners, values, _ = self.spread(sources, sources)
        gathered = [None] * len(sources)
        for owner, gradient in zip(owners, gradient_of(values), strict=True):
            if gradient is not None:
                gathered[owner] = gradient if gathered[owner] is None else gathered[owner] + gradient
        return gathered


class ReadLog(Block):
    """Lists the variables that this thread reads inside the block, in the order of their first read.

    `has_custom_gradient` says whether a custom gradient was called in the block.
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
    """Whether `variable` has `value` only because a stateless scope maps it to this value."""
    return value is not variable._value and not is_assigned_in_scope(variable)


def install_read_hook(watch_read, meet=None):
    """Calls `watch_read(variable, value, tapes) -> value` for every read of a variable that some active tapes watch.

    `watch_read` returns the value that the reader is given, and must call `note_read` with it on each of the tapes.
    `meet(variable)` is called at every read.
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
