"""The logs of a step, which Keras 3.10 converts to floats inside of the step. Later versions do so after it."""

import functools

from keras_gradtools.backend.torch.compiled import notices
from keras_gradtools.keras_internals.logs import pythonify_logs


def install():
    pythonify_logs.replace(_unless_recording)


def _unless_recording(convert):
    @functools.wraps(convert)
    def call(logs):
        return convert(logs) if notices.current() is None else logs

    return call
