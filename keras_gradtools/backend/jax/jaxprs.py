"""Inspects JAX's programs (jaxprs)."""

import weakref

import jax
from jax._src import core, hijax
from jax._src.array import ArrayImpl
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


def named(primitive):
    """The name of a primitive for error messages."""
    return {
        "custom_jvp_call": "a function under `jax.custom_jvp`",
        "custom_vjp_call": "a function under `jax.custom_vjp`",
        "call_hi_primitive": "a primitive with a custom derivative",
    }.get(primitive.name, f"a program of JAX's `{primitive.name}`")


def programs_in(params):
    """The programs in the parameters of an operation."""
    found = []
    for value in params.values():
        if isinstance(value, (ClosedJaxpr, Jaxpr)):
            found.append(value)
        elif isinstance(value, tuple):
            found.extend(v for v in value if isinstance(v, (ClosedJaxpr, Jaxpr)))
    return found


def programs_of(primitive, params):
    """`programs_in(params)`, faster: which parameters may hold programs is determined once per primitive."""
    names = _names.get(primitive)
    if names is None:
        holding = (name for name, value in params.items() if "jaxpr" in name or programs_in({name: value}))
        names = _names[primitive] = tuple(holding)
    return programs_in({name: params[name] for name in names if name in params}) if names else ()


_names: dict = {}


def is_high(primitive, inputs, params, programs):
    """Whether JAX expands this primitive into others before it runs them (a high-level primitive)."""
    rule = primitive.is_high
    if getattr(rule, "__func__", None) is core.Primitive.is_high or programs and type(primitive) is core.Primitive:
        return any(program.is_high for program in programs)
    return rule(*map(core.typeof, inputs), **params)


def bind(equation, values):
    """Runs an equation of a program on values. Returns a list of its outputs."""
    found = equation.primitive.get_bind_params(equation.params)
    # Older versions of JAX return the functions of a custom derivative apart from the parameters.
    subfuns, params = found if isinstance(found, tuple) else ((), found)
    outputs = equation.primitive.bind(*subfuns, *values, **params)
    return outputs if equation.primitive.multiple_results else [outputs]


def opened(program):
    return program.jaxpr if isinstance(program, ClosedJaxpr) else program


def _within(program):
    """Yields `program` and all programs inside it."""
    yield program
    for equation in opened(program).eqns:
        for inner in programs_in(equation.params):
            yield from _within(inner)


def primitives_of(fun):
    """The names of the primitives of `fun() -> list of arrays`, those in programs inside it included."""
    program = jax.make_jaxpr(lambda: list(fun()))()
    return {equation.primitive.name for inner in _within(program) for equation in opened(inner).eqns}


def constants(program):
    """The distinct arrays that are constants of `program`, or of programs inside it."""
    found = _constants.get(program)
    if found is None:
        by_id = {id(x): x for inner in _within(program) for x in _own_constants(inner)}
        found = _constants[program] = tuple(by_id.values())
    return found


_constants: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _own_constants(program):
    jaxpr = opened(program)
    atoms = [*jaxpr.outvars, *(v for equation in jaxpr.eqns for v in equation.invars)]
    values = [*getattr(program, "consts", ()), *(v.val for v in atoms if isinstance(v, Literal))]
    return [x for x in values if isinstance(x, (ArrayImpl, core.Tracer))]


def lacks_forward_mode(primitive, params):
    """Whether an operation, or one inside its programs, has a custom derivative only for reverse mode."""
    if primitive.name == "call_hi_primitive":
        rules = params.get("_prim", params.get("prim"))
        while isinstance(rules, hijax.VmapOf):
            rules = rules.prim
        return type(rules).vjp_fwd is not hijax.VJPHiPrimitive.vjp_fwd
    return primitive.name == "custom_vjp_call" or any(
        lacks_forward_mode(equation.primitive, equation.params)
        for program in programs_in(params)
        for equation in opened(program).eqns
    )


def text_of(program):
    """A text that is equal for two programs only if they compute the same. Empty if no text can ensure that."""
    # The text of a program contains no constants, and only the names of custom derivatives and callbacks.
    if constants(program):
        return ""
    for inner in _within(program):
        if getattr(inner, "consts", ()) or any(e.primitive.name in _HIDE_FUNCTIONS for e in opened(inner).eqns):
            return ""
    return str(program)


_HIDE_FUNCTIONS = {
    "call_hi_primitive",
    "custom_jvp_call",
    "custom_vjp_call",
    "debug_callback",
    "io_callback",
    "pure_callback",
}
