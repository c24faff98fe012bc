"""Makes JAX turn closed-over values into inputs where a tape follows these values.

`jax.closure_convert` turns closed-over values into arguments, for libraries that pass a function to a custom derivative
(`jax.experimental.ode.odeint`). It does so only for tracers and takes arrays for constants, but the values that a tape
follows are arrays. JAX's loops, branches and solvers do the same with all arrays, except those in compiled functions
inside. In both cases a gradient would lack a part, so this file replaces the two functions of JAX.
"""

import functools

import jax
from jax._src import core, custom_derivatives
from jax._src.interpreters import partial_eval

from keras_gradtools.backend.jax import current_trace, jaxprs, lifting


def install():
    convert = custom_derivatives._closure_convert_for_avals
    changed = functools.partial(_closure_convert_for_avals, convert)
    # JAX calls `__wrapped__` to bypass the cache of the original.
    vars(changed)["__wrapped__"] = functools.partial(_closure_convert_for_avals, convert.__wrapped__)
    custom_derivatives._closure_convert_for_avals = changed
    partial_eval.separate_consts = functools.partial(_separate_consts, partial_eval.separate_consts)


def _followed_as_inputs(program):
    """Returns `program` with the constants that tapes follow as additional first inputs, and these constants."""
    follows = current_trace.follower()
    found = [x for x in jaxprs.constants(program) if follows(x)] if follows else []
    try:
        return lifting.with_inputs(program, found), found
    except lifting.Unknown:
        return program, []


def _separate_consts(separate, program):
    program, found = _followed_as_inputs(program)
    program, consts = separate(program)
    return program, [*consts, *found]


def _closure_convert_for_avals(convert, fun, structure, avals, *rest):
    converted, hoisted = convert(fun, structure, avals, *rest)
    if current_trace.follower() is None:
        return converted, hoisted
    results = []

    def flat(hoisted, *leaves):
        result, result_structure = jax.tree.flatten(converted(*jax.tree.unflatten(structure, leaves), *hoisted))
        results[:] = [result_structure]
        return result

    examples = [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in avals]
    program, found = _followed_as_inputs(jax.make_jaxpr(flat)(hoisted, *examples))
    if not found:
        return converted, hoisted
    (result_structure,) = results

    def converted_again(*args_and_consts):
        count = len(args_and_consts) - len(hoisted) - len(found)
        leaves, given = jax.tree.flatten(args_and_consts[:count])
        if given != structure:
            raise TypeError(
                "A function from `jax.closure_convert` expects arguments with the structure of the example arguments, "
                f"{structure}. Received: {given}."
            )
        consts, more = args_and_consts[count : count + len(hoisted)], args_and_consts[count + len(hoisted) :]
        return jax.tree.unflatten(result_structure, core.jaxpr_as_fun(program)(*more, *consts, *leaves))

    return converted_again, [*hoisted, *found]
