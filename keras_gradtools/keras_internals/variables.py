"""Keras' variables: reading, autocasting, initializing."""

import keras

from keras_gradtools.keras_internals import patches
from keras_gradtools.keras_internals.lookup import find

_HOME = "keras.src.backend.common.variables"

# The base class of the variables of all backends, which defines `_maybe_autocast`.
Variable = find(f"{_HOME}:KerasVariable", f"{_HOME}:Variable")
AutocastScope = find(f"{_HOME}:AutocastScope")
get_autocast_scope = find(f"{_HOME}:get_autocast_scope")
initialize_all_variables = find(f"{_HOME}:initialize_all_variables")

# Every value that is read from a variable passes through this method.
autocast = patches.Hook(Variable, "_maybe_autocast", [keras.Variable.value])
# Every value that a new variable starts with passes through this method of the backend's class.
initialize = patches.Hook(keras.Variable, "_initialize", [Variable.__init__])
# Every value that is assigned to a variable, outside of a `StatelessScope`, passes through this method.
direct_assign = patches.Hook(keras.Variable, "_direct_assign", [Variable.assign])
