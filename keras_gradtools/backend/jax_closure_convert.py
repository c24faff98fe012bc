"""Where JAX makes inputs of what a function closes over, it does so with what a tape follows, too.

`jax.closure_convert` does it for libraries that give a function to a custom derivative (`jax.experimental.ode.odeint`),
for values that may have a derivative: it takes a tracer for one, and an array for a constant. Loops, branches and
solvers do it with all arrays, except for those in programs that are compiled inside. What a tape follows is an array.
"""

import functools

import jax
from jax._src import core, custom_derivatives
from jax._src.interpreters import partial_eval

from keras_gradtools.backend import jax_programs, jax_trace


def install():
    convert = custom_derivatives._closure_convert_for_avals
    changed = functools.partial(_closure_convert_for_avals, convert)
    # What goes past JAX's cache.
    vars(changed)["__wrapped__"] = functools.partial(_closure_convert_for_avals, convert.__wrapped__)
    custom_derivatives._closure_convert_for_avals = changed
    partial_eval.separate_consts = functools.partial(_separate_consts, partial_eval.separate_consts)


def _followed_as_inputs(program):
    """`program` with the constants that tapes follow as inputs in front of its own, and these constants."""
    follows = jax_trace.follower()
    found = [x for x in jax_programs.constants(program) if follows(x)] if follows else []
    try:
        return jax_programs.with_inputs(program, found), found
    except jax_programs.Unknown:
        return program, []


def _separate_consts(separate, program):
    program, found = _followed_as_inputs(program)
    program, consts = separate(program)
    return program, [*consts, *found]


def _closure_convert_for_avals(convert, fun, structure, avals, *rest):
    converted, hoisted = convert(fun, structure, avals, *rest)
    if jax_trace.follower() is None:
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
                "A function that `jax.closure_convert` has made takes arguments with the structure of the examples, "
                f"{structure}. Received: {given}."
            )
        consts, more = args_and_consts[count : count + len(hoisted)], args_and_consts[count + len(hoisted) :]
        return jax.tree.unflatten(result_structure, core.jaxpr_as_fun(program)(*more, *consts, *leaves))

    return converted_again, [*hoisted, *found]
