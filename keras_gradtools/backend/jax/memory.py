"""How much memory a computation on JAX needs, and how much there is."""

import math

import jax

from keras_gradtools.backend.jax.jaxprs import opened, programs_in


def computed_bytes(fun):
    return _of_program(jax.make_jaxpr(lambda: list(fun()))())


def free_bytes():
    statistics = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" not in statistics:
        return None
    return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)


def _of_program(program):
    return sum(map(_of_equation, opened(program).eqns))


def _of_equation(equation):
    inner = programs_in(equation.params)
    if inner:
        # The number of iterations of a `scan` is known, that of a `while` is not. One branch of a condition runs.
        return equation.params.get("length", 1) * max(map(_of_program, inner))
    return sum(_size(variable.aval) for variable in equation.outvars)


def _size(aval):
    # Random keys have a dtype without a size.
    return math.prod(getattr(aval, "shape", ())) * getattr(getattr(aval, "dtype", None), "itemsize", 0)
