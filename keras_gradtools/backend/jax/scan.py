"""Keeps the rules of custom derivatives inside `jax.lax.scan` when the scan is differentiated twice.

Reverse mode splits a scan into two: one that saves values, and a linear one. JAX moves what is the same in all
iterations out of the first scan, by a partial evaluation that assumes that the rest is linear. It therefore inlines
every `jax.custom_jvp` function without its rule, and the second derivative is silently that of the inlined function.
`jnp.logaddexp` is such a function, and Keras' CTC loss calls it in a scan.

This file uses internals of JAX.
"""

import functools

from jax._src import core
from jax._src.lax.control_flow import loops


def install():
    """Replaces JAX's function that moves loop-invariant values out of a scan, if this JAX has it."""
    original = getattr(loops, "_scan_known_hoisting", None)
    if original is not None:
        loops._scan_known_hoisting = _without_losing_rules(original)


def _without_losing_rules(original):
    @functools.wraps(original)
    def hoisting(jaxpr_known, known_consts, num_res):
        if _has_rules(jaxpr_known.jaxpr):
            return jaxpr_known, known_consts, [False] * num_res, []  # moves nothing
        return original(jaxpr_known, known_consts, num_res)

    return hoisting


def _has_rules(jaxpr):
    if any(equation.primitive.name == "custom_jvp_call" for equation in jaxpr.eqns):
        return True
    return any(map(_has_rules, core.subjaxprs(jaxpr)))
