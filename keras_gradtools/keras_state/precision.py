"""The precision in which Keras computes by default."""

from typing import Any, NamedTuple

import keras

from keras_gradtools.keras_internals import dtypes
from keras_gradtools.keras_internals.scopes import global_state


class Precision(NamedTuple):
    """Keras' `floatx`, its dtype policy or None if there is none yet, and the dtypes of results in double precision."""

    floatx: str
    policy: Any
    results: dict[str, str]


def current():
    """The `Precision` at this moment."""
    # Asking Keras for its policy would make one, which then no longer follows `floatx`.
    policy = global_state.get_global_attribute("dtype_policy")
    return Precision(keras.config.floatx(), policy, dtypes.results_of_doubles())


def restore(precision):
    """Sets Keras to a `Precision`."""
    keras.config.set_floatx(precision.floatx)
    global_state.set_global_attribute("dtype_policy", precision.policy)
    dtypes.set_results_of_doubles(precision.results)


DOUBLE = Precision("float64", None, {name: name for name in dtypes.DOUBLES})
