"""Inspects JAX's programs (jaxprs), and turns their constants into inputs.

In a function that is compiled, or passed to `lax.scan`, a closed-over array becomes a constant of the program, so JAX's
derivative of the operation ignores it. If a tape follows the array, it must be an input instead. `with_inputs` moves
such constants to the front of the inputs, also those of programs inside the program.
"""

import weakref

from jax._src import core, hijax
from jax._src.array import ArrayImpl
from jax._src.effects import JaxprInputEffect
from jax._src.sharding_impls import UNSPECIFIED
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive, Var
from jax.interpreters import ad, batching, mlir

closed_over_p = Primitive("closed_over")
closed_over_p.def_impl(lambda x, by: x)
closed_over_p.def_abstract_eval(lambda x, by: x)
batching.defvectorized(closed_over_p)
mlir.register_lowering(closed_over_p, lambda _, x, by: [x])


def _refuse(_, x, *, by):
    raise ValueError(
        f"A derivative with respect to a value that {by} closes over cannot be taken: only those with respect to its "
        f"arguments are known. Received: a closed-over value of shape {x.shape} and dtype {x.dtype}. Pass it as an "
        "argument. If it is meant as a constant, close over `kg.stop_gradient(value)`."
    )


ad.defjvp(closed_over_p, _refuse)


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


def _open(program):
    return program.jaxpr if isinstance(program, ClosedJaxpr) else program


def _within(program):
    """Yields `program` and all programs inside it."""
    yield program
    for equation in _open(program).eqns:
        for inner in programs_in(equation.params):
            yield from _within(inner)


def constants(program):
    """The distinct arrays that are constants of `program`, or of programs inside it."""
    found = _constants.get(program)
    if found is None:
        by_id = {id(x): x for inner in _within(program) for x in _own_constants(inner)}
        found = _constants[program] = tuple(by_id.values())
    return found


_constants: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _own_constants(program):
    jaxpr = _open(program)
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
        for equation in _open(program).eqns
    )


def text_of(program):
    """A text that is equal for two programs only if they compute the same. Empty if no text can ensure that."""
    # The text of a program contains no constants, and only the names of custom derivatives and callbacks.
    if constants(program):
        return ""
    for inner in _within(program):
        if getattr(inner, "consts", ()) or any(e.primitive.name in _HIDE_FUNCTIONS for e in _open(inner).eqns):
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


class Unknown(Exception):
    """A constant cannot be turned into an input, because the rules here do not support the program that holds it."""


def constants_as_inputs(primitive, params, wanted):
    """Changes the parameters of an operation so that its programs take some constants as inputs.

    `wanted` maps ids to these constants. Returns the changed parameters, and a list of pairs of a position in the
    inputs of the operation and the constants to insert there, see `insert`. Raises `Unknown` if that is not possible.
    """

    def found_in(program):
        return [x for x in constants(program) if id(x) in wanted]

    if not any(map(found_in, programs_in(params))):
        return params, []
    if primitive.name not in _RULES:
        raise Unknown
    return _RULES[primitive.name](params, found_in)


def insert(inputs, inserted, values):
    """Returns `inputs` with constants inserted.

    `inserted` is a result of `constants_as_inputs`. `values` maps the ids of the constants to what is inserted.
    """
    inputs = list(inputs)
    for position, consts in reversed(inserted):
        inputs[position:position] = [values[id(x)] for x in consts]
    return inputs


def with_inputs(program, consts):
    """Returns `program` with its constants `consts`, at any depth, as additional first inputs."""
    if not consts:
        return program
    places = {id(x): place for place, x in enumerate(constants(program))}
    key = tuple(places.get(id(x), core.typeof(x)) for x in consts)
    known = _lifted.setdefault(program, {})
    if key not in known:
        known[key] = _lift(program, {id(x): x for x in consts})
    return known[key]


_lifted: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _lift(program, wanted):
    jaxpr, consts = _open(program), getattr(program, "consts", ())
    if any(isinstance(effect, JaxprInputEffect) for effect in jaxpr.effects):
        raise Unknown  # such effects refer to inputs by position
    variables = {i: Var(core.typeof(x)) for i, x in wanted.items()}
    renamed = {v: variables[id(x)] for v, x in zip(jaxpr.constvars, consts, strict=False) if id(x) in wanted}

    def atom(v):
        return variables.get(id(v.val), v) if isinstance(v, Literal) else renamed.get(v, v)

    equations = []
    for equation in jaxpr.eqns:
        params, inserted = constants_as_inputs(equation.primitive, equation.params, wanted)
        inputs = insert([atom(v) for v in equation.invars], inserted, variables)
        if equation.primitive.name in ("custom_jvp_call", "custom_vjp_call"):
            for i, v in enumerate(inputs[: params["num_consts"]]):
                if not isinstance(v, Literal):
                    inputs[i] = Var(v.aval)
                    by = {"by": named(equation.primitive)}
                    equations.append(core.new_jaxpr_eqn([v], [inputs[i]], closed_over_p, by, core.no_effects))
        equations.append(equation.replace(invars=inputs, params=params))
    names = jaxpr.debug_info.arg_names
    lifted = jaxpr.replace(
        constvars=[v for v in jaxpr.constvars if v not in renamed],
        invars=[*variables.values(), *jaxpr.invars],
        outvars=[atom(v) for v in jaxpr.outvars],
        eqns=equations,
        debug_info=jaxpr.debug_info._replace(
            arg_names=None if names is None else ("",) * len(variables) + tuple(names)
        ),
    )
    if not isinstance(program, ClosedJaxpr):
        return lifted
    return ClosedJaxpr(lifted, [x for x in consts if id(x) not in wanted])


def _jit(params, found_in):
    consts = found_in(params["jaxpr"])
    more = {"in_shardings": UNSPECIFIED, "in_layouts": None, "donated_invars": False}
    longer = {name: (x,) * len(consts) + params[name] for name, x in more.items() if name in params}
    return {**params, **longer, "jaxpr": with_inputs(params["jaxpr"], consts)}, [(0, consts)]


def _call(name):
    def rule(params, found_in):
        consts = found_in(params[name])
        longer = {"num_consts": params["num_consts"] + len(consts)} if "num_consts" in params else {}
        return {**params, **longer, name: with_inputs(params[name], consts)}, [(0, consts)]

    return rule


def _scan(params, found_in):
    consts = found_in(params["jaxpr"])
    longer = {"num_consts": params["num_consts"] + len(consts)}
    if "linear" in params:
        longer["linear"] = (False,) * len(consts) + params["linear"]
    return {**params, **longer, "jaxpr": with_inputs(params["jaxpr"], consts)}, [(0, consts)]


def _while(params, found_in):
    changed, inserted, position = dict(params), [], 0
    for part in ("cond", "body"):
        program, count = params[f"{part}_jaxpr"], params[f"{part}_nconsts"]
        consts = found_in(program)
        changed |= {f"{part}_jaxpr": with_inputs(program, consts), f"{part}_nconsts": count + len(consts)}
        inserted.append((position, consts))
        position += count
    return changed, inserted


def _cond(params, found_in):
    # All branches must have the same inputs.
    consts = list({id(x): x for branch in params["branches"] for x in found_in(branch)}.values())
    return {**params, "branches": tuple(with_inputs(branch, consts) for branch in params["branches"])}, [(1, consts)]


def _linear_solve(params, found_in):
    programs, counts, inserted, position = [], [], [], 0
    for program, count in zip(params["jaxprs"], params["const_lengths"], strict=True):
        consts = found_in(program) if program is not None else []
        programs.append(with_inputs(program, consts))
        counts.append(count + len(consts))
        inserted.append((position, consts))
        position += count
    changed = {"jaxprs": type(params["jaxprs"])(*programs), "const_lengths": type(params["const_lengths"])(*counts)}
    return {**params, **changed}, inserted


_RULES = {
    "checkpoint": _call("jaxpr"),
    "closed_call": _call("call_jaxpr"),
    "cond": _cond,
    "core_call": _call("call_jaxpr"),
    "custom_jvp_call": _call("call_jaxpr"),
    "custom_vjp_call": _call("call_jaxpr"),
    "jit": _jit,
    "custom_linear_solve": _linear_solve,
    "pjit": _jit,
    "remat2": _call("jaxpr"),
    "scan": _scan,
    "while": _while,
}
