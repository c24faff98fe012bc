"""Aliases: other objects for the same value, because a tape on JAX follows values by identity."""

import jax
from jax._src import core
from jax._src.array import ArrayImpl
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

alias_p = Primitive("tape_alias")
alias_p.def_impl(lambda x: x)
alias_p.def_abstract_eval(lambda x: x)
ad.deflinear2(alias_p, lambda cotangent, _: [cotangent])
batching.defvectorized(alias_p)
mlir.register_lowering(alias_p, lambda _, x: [x])


def alias(x):
    """Returns another object for the same value, without a copy."""
    if isinstance(x, core.Tracer):
        other = x._trace.process_primitive(alias_p, [x], {})
        # Some tracers only wrap a value of the level below.
        return other if isinstance(other, core.Tracer) else alias(jax.numpy.asarray(other))
    return ArrayImpl(x.aval, x.sharding, x._arrays, committed=x._committed, _skip_checks=True)


def recorded_alias(x, trace=None):
    """Returns another object for the same value, which all tapes that follow `x` follow, too.

    With `trace`, the alias belongs to the level that `trace` records, even while JAX traces a program inside it.
    """
    with core.set_current_trace(trace or core.trace_ctx.trace):
        other = alias_p.bind(x)
    return alias(x) if other is x else other


def is_followable(x):
    """Whether a tape can follow `x`: an array or tracer with a derivative."""
    return isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.numpy.inexact)
