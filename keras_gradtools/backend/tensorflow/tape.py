"""The tape on TensorFlow: a `tf.GradientTape` that follows Keras' `trainable` flags, which TensorFlow's own ignores."""

import keras
from tensorflow.python import pywrap_tfe
from tensorflow.python.framework import ops

from keras_gradtools.backend.tensorflow import variables
from keras_gradtools.backend.tensorflow.native_tape import NativeTape
from keras_gradtools.keras_state import numpy_calls, recording


class Tape(recording.Recording):
    """A `tf.GradientTape` that watches the variables that are trainable in Keras.

    The native tape is always persistent: `tape/gradient_tape.py` decides whether a second derivative is allowed. It
    also watches accessed variables by itself, because a `tf.function` that was traced earlier reads them without
    calling Keras.
    """

    watches_parts = True

    def __init__(self, watch_accessed_variables):
        super().__init__(watch_accessed_variables)
        self._block = self._new_block()
        self.custom_gradients = []
        # Whether an operation was recorded whose gradient is a function of Python that may do anything.
        self.has_opaque_operation = False
        self._watch_later = []
        self._seen_by_native = []

    @property
    def native(self):
        """The `tf.GradientTape`."""
        return self._block.tape

    def _new_block(self):
        return NativeTape(True, self._watch_accessed_variables)

    def begin(self):
        super().begin()
        self._block.begin()
        for tensor in self._watch_later:
            self.native.watch(tensor)
        self._watch_later = []

    def end(self):
        super().end()
        self._block.end()

    def pause(self):
        self.end()

    def resume(self):
        self.begin()

    def reset(self):
        super().reset()
        self.custom_gradients = []
        self.has_opaque_operation = False
        self._watch_later = []
        self._seen_by_native = []
        recording_now = self in recording.active_tapes()
        self._block.end()
        self._block = self._new_block()
        if recording_now:
            self._block.begin()

    def release(self):
        self._block.end()
        self._seen_by_native += self.native.watched_variables()
        self._block = self._new_block()
        self.custom_gradients = []
        self.has_opaque_operation = False

    def watched_variables(self):
        """The variables that Keras reported, in the order of their reads, then those that only the native tape saw."""
        watched = super().watched_variables()
        others = variables.owners((*self._seen_by_native, *self.native.watched_variables()))
        known = set(map(id, watched))
        for variable in others:
            # The native tape reads TensorFlow's `trainable` flag, which may be out of date for a Keras variable.
            if id(variable) not in known and not (isinstance(variable, keras.Variable) and not self.wants(variable)):
                watched.append(variable)
                known.add(id(variable))
        return watched

    def watch(self, tensor):
        if self in recording.active_tapes():
            self.native.watch(tensor)
        else:
            # The native tape ignores `watch` while it is paused.
            self._watch_later.append(tensor)

    def watch_variable(self, variable):
        super().watch_variable(variable)
        self.watch(variable._value)

    def depends(self, value, others):
        return any(g is not None for g in self.native.gradient(value, others))

    def values_read(self, variable):
        values = super().values_read(variable)
        if not values and self.wants(variable) and variable._value is not None:
            # Read by a `tf.function` that was traced earlier: only the native tape has seen it.
            return [variable._value]
        return values


def _watch_read(variable, value, tapes):
    if not value.dtype.is_floating:
        return value
    for tape in tapes:
        # The native tape reads TensorFlow's `trainable` flag, which is set when the variable is created. Without this,
        # it would not watch a layer that was unfrozen later.
        tape.native.watch(value)
        tape.note_read(variable, value, recording.is_lent(variable, value))
    return value


def _is_recorded(tensor):
    return bool(pywrap_tfe.TFE_Py_TapeSetPossibleGradientTypes([tensor]))


def install():
    recording.install_read_hook(_watch_read, variables.meet)
    numpy_calls.install(ops.EagerTensor, _is_recorded)
