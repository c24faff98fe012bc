"""Turns constants of a JAX program into inputs.

In a function that is compiled, or passed to `lax.scan`, a closed-over array becomes a constant of the program, so JAX's
derivative of the operation ignores it. If a tape follows the array, it must be an input instead. `with_inputs` moves
such constants to the front of the inputs, also those of programs inside the program.
"""

import weakref

from jax._src import core
from jax._src.effects import JaxprInputEffect
from jax._src.sharding_impls import UNSPECIFIED
from jax.extend.core import ClosedJaxpr, Literal, Primitive, Var
from jax.interpreters import ad, batching, mlir

from keras_gradtools.backend.jax.jaxprs import constants, named, opened, programs_in

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
    jaxpr, consts = opened(program), getattr(program, "consts", ())
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
