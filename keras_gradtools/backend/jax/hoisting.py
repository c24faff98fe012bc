"""Functions for loops: what does not depend on the argument is computed before the loop."""

import functools

import jax
from jax.extend.core import Literal

from keras_gradtools.backend.jax import jaxprs


def hoisted(fun, like):
    """`fun`, a function of an array like `like`, of which the rest is computed here, once.

    Matrices from the rest are also transposed here if a matrix product of the function sums over their rows. On a CPU,
    XLA computes such a product faster with the transposed matrix, but does not transpose it before a loop by itself.
    """
    program = jax.make_jaxpr(fun)(like)
    (argument,) = program.jaxpr.invars
    known = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    varying, equations = {argument}, []
    for equation in program.jaxpr.eqns:
        if any(x in varying for x in equation.invars if not isinstance(x, Literal)):
            varying.update(equation.outvars)
            equations.append(equation)
        else:
            values = [x.val if isinstance(x, Literal) else known[x] for x in equation.invars]
            known.update(zip(equation.outvars, jaxprs.bind(equation, values), strict=True))
    binds = [_bound(equation, known) for equation in equations]

    def run(x):
        values = {**known, argument: x}
        for equation, bind in zip(equations, binds, strict=True):
            inputs = [x.val if isinstance(x, Literal) else values[x] for x in equation.invars]
            values.update(zip(equation.outvars, bind(inputs), strict=True))
        (result,) = program.jaxpr.outvars
        return result.val if isinstance(result, Literal) else values[result]

    return run


def _bound(equation, known):
    """A function of the inputs of an equation that returns its outputs."""
    is_product = equation.primitive is jax.lax.dot_general_p
    if not is_product or equation.params["dimension_numbers"] != (((0,), (0,)), ((), ())):
        return functools.partial(jaxprs.bind, equation)
    left, right = equation.invars
    if any(isinstance(x, Literal) or x.aval.ndim != 2 for x in (left, right)) or not (left in known or right in known):
        return functools.partial(jaxprs.bind, equation)
    params = {**equation.params, "dimension_numbers": (((1,), (0,)), ((), ()))}
    if left in known:
        fixed = known[left].T
        return lambda inputs: [equation.primitive.bind(fixed, inputs[1], **params)]
    fixed = known[right].T
    return lambda inputs: [equation.primitive.bind(fixed, inputs[0], **params).T]
