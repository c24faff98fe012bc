"""A `tf.GradientTape` as a `Block`: no interrupt leaves it recording, as one of `tf.GradientTape.__enter__` may.

TensorFlow does not say which tapes are in its set of recording tapes, and removing one that is not in the set crashes
the process. So each change of the set is noted: an odd number of notes means that the tape is in the set. `extend` with
`map` runs in C, so an interrupt cannot come between a change and its note.
"""

import tensorflow as tf
from tensorflow.python import pywrap_tfe
from tensorflow.python.eager import tape as tape_module

from keras_gradtools.blocks import Block


class NativeTape(Block):
    """Records while its block runs: `with native, native:`, for the reason that `Block` gives.

    Args:
        persistent, watch_accessed_variables: As for `tf.GradientTape`.

    Attributes:
        tape: The `tf.GradientTape`.
    """

    def __init__(self, persistent=False, watch_accessed_variables=False):
        self.tape = tf.GradientTape(persistent=persistent, watch_accessed_variables=watch_accessed_variables)
        # A native tape that was never entered has no `_tape`, and `gradient` would raise the error for a second call.
        made: list = []
        try:
            made.extend(map(pywrap_tfe.TFE_Py_TapeSetNew, (persistent,), (watch_accessed_variables,)))
        finally:
            for one in made:
                pywrap_tfe.TFE_Py_TapeSetRemove(one)
        self.tape._tape = tape_module.Tape(made[0])
        self._handle = made[0]
        self._notes: list = []

    def begin(self):
        if len(self._notes) % 2 == 0:
            self._notes.clear()
            self._notes.extend(map(pywrap_tfe.TFE_Py_TapeSetAdd, (self._handle,)))
        self.tape._recording = True

    def end(self):
        if len(self._notes) % 2:
            self._notes.extend(map(pywrap_tfe.TFE_Py_TapeSetRemove, (self._handle,)))
        self.tape._recording = False
