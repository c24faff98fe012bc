"""Lets a tape record calls of `jax.custom_jvp` and `jax.custom_vjp` under `jax.vmap`.

Under `vmap`, JAX passes such a call to the tape as functions that do the batching when they run. A tape runs them for
the derivative, when the `vmap` has ended and the tracers that they close over are invalid. Also, an unbatched value has
no batch axis there, but its derivative may have one. So while the `vmap` is active, the functions are traced to
programs, which remain valid.
"""

import jax
import numpy as np
from jax._src import ad_util, core


def _is_of_jax(fun):
    return (getattr(fun.f, "__module__", None) or "").startswith("jax.")


def closes_over_nothing(fun):
    """Whether the function of a custom derivative is one of JAX's own, such as relu, without closed-over values."""
    # JAX passes `nondiff_argnums`, which may be any values, by a transformation with "partial" in its name.
    return (
        _is_of_jax(fun)
        and getattr(getattr(fun.f, "__wrapped__", fun.f), "__closure__", ()) is None
        and not any("partial" in getattr(transform, "__name__", "partial") for transform, _ in fun.transforms)
    )


def is_batched(fun):
    """Whether the function of a custom derivative is a user's function that a `vmap` batches."""
    # JAX's own functions stay as they are: they close over nothing, and cached programs are found by their identity.
    if _is_of_jax(fun):
        return False
    return any(isinstance(p, core.TraceTag) for _, parameters in fun.transforms for p in parameters)


def jvp_by_program(rule, inputs, symbolic_zeros, is_perturbed):
    """A `custom_jvp` of `inputs` whose rule is `rule(*primals, *tangents)`, traced to a program.

    With `symbolic_zeros`, inputs for which `is_perturbed` is False get symbolic zeros as tangents.
    """
    moved = [i for i, x in enumerate(inputs) if _has_derivative(x) and (not symbolic_zeros or is_perturbed(x))]
    steered = []

    def values_and_slopes(primals, directions):
        tangents = [_zero_tangent(x, symbolic_zeros) for x in primals]
        for i, v in zip(moved, directions, strict=True):
            tangents[i] = v
        outputs = rule(*primals, *tangents)
        values, slopes = outputs[: len(outputs) // 2], outputs[len(outputs) // 2 :]
        steered[:] = [i for i, y in enumerate(values) if _has_derivative(y)]
        return [*values, *(_instantiated(slopes[i]) for i in steered)]

    program = jax.make_jaxpr(values_and_slopes)(list(inputs), [inputs[i] for i in moved])
    count = len(program.out_avals) - len(steered)

    def run(primals, tangents):
        outputs = core.jaxpr_as_fun(program)(*primals, *[tangents[i] for i in moved])
        return outputs[:count], outputs[count:]

    @jax.custom_jvp
    def call(*primals):
        return run(primals, [_zero_tangent(x) for x in primals])[0]

    @call.defjvp
    def _(primals, tangents):
        values, slopes = run(primals, tangents)
        full = [_zero_tangent(y) for y in values]
        for i, v in zip(steered, slopes, strict=True):
            full[i] = v
        return values, full

    return call


def vjp_by_programs(bind, inputs):
    """A `custom_vjp` of `inputs` whose rules are those of `bind(inputs)`, traced to programs."""
    moved = [i for i, x in enumerate(inputs) if _has_derivative(x)]
    pullbacks = []

    def forward(primals):
        def of_moved(*xs):
            given = list(primals)
            for i, x in zip(moved, xs, strict=True):
                given[i] = x
            return list(bind(given))

        values, pullback = jax.vjp(of_moved, *[primals[i] for i in moved])
        residuals, structure = jax.tree.flatten(pullback)
        pullbacks[:] = [structure, len(values)]
        return [*values, *residuals]

    ahead = jax.make_jaxpr(forward)(list(inputs))
    structure, count = pullbacks
    steered = [i for i, aval in enumerate(ahead.out_avals[:count]) if _has_derivative(aval)]

    def backward(residuals, cotangents):
        full = [np.zeros(aval.shape, jax.dtypes.float0) for aval in ahead.out_avals[:count]]
        for i, u in zip(steered, cotangents, strict=True):
            full[i] = u
        return list(jax.tree.unflatten(structure, residuals)(full))

    like = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in ahead.out_avals]
    back = jax.make_jaxpr(backward)(like[count:], [like[i] for i in steered])

    @jax.custom_vjp
    def call(*primals):
        return core.jaxpr_as_fun(ahead)(*primals)[:count]

    def call_forward(*primals):
        outputs = core.jaxpr_as_fun(ahead)(*primals)
        return outputs[:count], outputs[count:]

    def call_backward(residuals, cotangents):
        gradients = core.jaxpr_as_fun(back)(*residuals, *[cotangents[i] for i in steered])
        full = [None] * len(inputs)
        for i, g in zip(moved, gradients, strict=True):
            full[i] = g
        return tuple(full)

    call.defvjp(call_forward, call_backward)
    return call


def _has_derivative(x):
    return jax.numpy.issubdtype(getattr(x, "dtype", type(x)), jax.numpy.inexact)


def _zero_tangent(x, symbolic=False):
    aval = core.typeof(x).to_tangent_aval()
    if symbolic:
        return ad_util.SymbolicZero(aval)
    return np.zeros(aval.shape, aval.dtype) if aval.dtype == jax.dtypes.float0 else jax.numpy.zeros_like(x)


def _instantiated(tangent):
    is_zero = isinstance(tangent, (ad_util.SymbolicZero, ad_util.Zero))
    return jax.numpy.zeros(tangent.aval.shape, tangent.aval.dtype) if is_zero else tangent
