"""Keras' rule for the dtype of a result, by which results in double precision become single on JAX and torch."""

from keras_gradtools.keras_internals.lookup import find

# For each dtype, the one that the result of an operation has in its place. `result_type` reads it at each call.
_REPLACED = find("keras.src.backend.common.dtypes:BIT64_TO_BIT32_DTYPE")
DOUBLES = ("float64", "complex128")


def results_of_doubles():
    """The dtypes of results that would be in double precision."""
    return {name: _REPLACED.get(name, name) for name in DOUBLES}


def set_results_of_doubles(dtypes):
    """Sets what `results_of_doubles` returns, for the whole process."""
    _REPLACED.update(dtypes)
