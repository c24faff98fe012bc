"""Custom gradients on JAX that keep their rule in derivatives of any order.

`jax.custom_gradient` does not suffice. For a second derivative it differentiates the code of the value and ignores the
rule, and it refuses a rule that closes over a value being differentiated. Here the function runs once, in the ordinary
trace. A `custom_vjp` that contains only the rule then links the values to the arguments, with everything that the rule
closes over as explicit inputs.
"""

import functools

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from keras_gradtools.backend.jax import aliases, jaxprs, trace
from keras_gradtools.keras_state.scopes import StateScope


class _Rule:
    """`grad_fn` as a program. Equal to any rule with the same program, so that a cached program is found again."""

    def __init__(self, closed):
        jaxpr = closed.jaxpr
        names = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
        jaxpr = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars], debug_info=names)
        self.program = ClosedJaxpr(jaxpr, [])
        self._text = jaxprs.text_of(self.program)

    def __hash__(self):
        return hash(self._text or id(self))

    def __eq__(self, other):
        return self is other or (isinstance(other, _Rule) and self._text != "" and self._text == other._text)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _link(rule, args, values, closure):
    """Returns `values`, as a function of `args` whose derivative is `rule`."""
    return values


def _link_forward(rule, args, values, closure):
    # `_link` again and not `values`, so that higher derivatives use the rule, too.
    return _link(rule, args, values, closure), closure


def _link_backward(rule, residuals, upstreams):
    # None stops here. An array of zeros would go on into `fun`, and become NaN where it meets an infinity.
    return jaxpr_as_fun(rule.program)(*residuals, *upstreams), None, None


_link.defvjp(_link_forward, _link_backward)


def custom_gradient(fun):
    def call(*args):
        values, grad_fn = fun(*args)
        # Values without a derivative, such as integers, need no link. `grad_fn` gets None for them.
        places = [i for i, v in enumerate(values) if aliases.is_followable(v)]

        def rule(*upstreams):
            upstream = dict(zip(places, upstreams, strict=True))
            return grad_fn(*[upstream.get(i) for i in range(len(values))])

        linked = [values[i] for i in places]
        # The rule is traced now and runs later, possibly more than once. A variable assigned now would keep a tracer.
        scope = StateScope()
        with scope, scope:
            closed = jax.make_jaxpr(rule)(*linked)
        if scope.variables_assigned:
            raise ValueError(
                "On JAX, the grad_fn of a custom gradient cannot assign to variables, nor draw random numbers, which "
                f"assigns to the seed. Received: a grad_fn that assigns to {scope.variables_assigned[0].path!r}. Do it "
                "in the function itself, before it returns `value, grad_fn`."
            )
        constants = [jax.lax.stop_gradient(v) for v in linked]
        link = _Rule(closed)
        with trace.custom_rule(link, len(args)):
            linked = _link(link, list(args), constants, list(closed.consts))
        results = dict(zip(places, linked, strict=True))
        return [results.get(i, v) for i, v in enumerate(values)]

    return call
