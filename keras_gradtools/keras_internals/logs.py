"""The logs of Keras' training loops."""

from keras_gradtools.keras_internals import patches
from keras_gradtools.keras_internals.lookup import find

# Converts the values of logs to floats.
pythonify_logs = patches.Hook(find("keras.src.utils.python_utils"), "pythonify_logs", [])
