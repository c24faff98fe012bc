"""Replaces Keras operations that, on JAX, may return their argument itself or have wrong derivatives.

`reshape` to the same shape returns its argument, for example. A tape follows values by identity and could not tell the
result from the argument. It would follow values that were computed while it was not recording, and confuse derivatives
with respect to the result and to the argument. So such results are replaced by aliases.
"""

import functools

from keras_gradtools.backend import keras_formulas
from keras_gradtools.backend.jax import aliases, current_trace
from keras_gradtools.keras_internals import backend_modules

_FORMULAS = {name: getattr(keras_formulas, name) for name in ("i0", "ldexp", "nextafter", "sinc")}


def install():
    for name, hook in backend_modules.hooks["numpy"].items():
        hook.replace(_FORMULAS.get(name) or _with_distinct_result(aliases.recorded_alias))
    backend_modules.hooks["core"]["stop_gradient"].replace(_with_distinct_result(aliases.alias))


def _with_distinct_result(alias):
    return functools.partial(_distinct, alias)


def _distinct(alias, fun):
    @functools.wraps(fun)
    def call(x, *args, **kwargs):
        y = fun(x, *args, **kwargs)
        handed_back = y is x or isinstance(x, (list, tuple)) and any(y is part for part in x)
        return alias(y) if handed_back and current_trace.needs_alias(y) else y

    return call
