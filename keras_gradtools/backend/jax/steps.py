"""The operations that a JAX tape has recorded, as steps of forward passes that carry several derivatives.

Programs inside operations (`jax.jit`) are taken apart into their own operations. Loops, conditions and functions with a
custom derivative are single steps: they have the derivatives that JAX gives them.
"""

import functools

import jax
from jax.extend.core import Literal

from keras_gradtools.backend import steps
from keras_gradtools.backend.jax import jaxprs, slices, sweep
from keras_gradtools.backend.jax.aliases import is_followable

# Linear in all active inputs together. Indices and predicates are integers or booleans, which are never active.
_LINEAR = {
    "add",
    "add_any",
    "broadcast_in_dim",
    "concatenate",
    "convert_element_type",
    "copy",
    "cumsum",
    "dynamic_slice",
    "dynamic_update_slice",
    "expand_dims",
    "gather",
    "imag",
    "neg",
    "pad",
    "real",
    "reduce_precision",
    "reduce_sum",
    "reduce_window_sum",
    "reshape",
    "rev",
    "scatter-add",
    "select_n",
    "slice",
    "split",
    "squeeze",
    "sub",
    "tape_alias",
    "transpose",
}
_BILINEAR = {"conv_general_dilated", "dot_general", "mul"}
_ELEMENTWISE = {
    "abs",
    "acos",
    "acosh",
    "asin",
    "asinh",
    "atan",
    "atan2",
    "atanh",
    "bessel_i0e",
    "bessel_i1e",
    "cbrt",
    "ceil",
    "clamp",
    "cos",
    "cosh",
    "digamma",
    "div",
    "erf",
    "erf_inv",
    "erfc",
    "exp",
    "exp2",
    "expm1",
    "floor",
    "integer_pow",
    "lgamma",
    "log",
    "log1p",
    "logistic",
    "max",
    "min",
    "pow",
    "round",
    "rsqrt",
    "sign",
    "sin",
    "sinh",
    "sqrt",
    "square",
    "tan",
    "tanh",
}
_PIECEWISE_LINEAR = {
    "abs",
    "ceil",
    "clamp",
    "cummax",
    "cummin",
    "floor",
    "max",
    "min",
    "reduce_max",
    "reduce_min",
    "reduce_window_max",
    "round",
    "select_n",
    "sign",
    "sort",
}
# JAX's own functions with a custom derivative whose second derivative is zero.
_RECTIFIERS = ("relu at ", "relu6 at ")
_CLOSED_FORMS = {name: name for name in ("cos", "exp", "sin", "sinh", "cosh", "square", "tanh")}
_CLOSED_FORMS["logistic"] = "sigmoid"
_PROGRAMS = {"pjit", "jit", "closed_call", "core_call"}


def steps_between(tape, operations, targets, sources):
    part = slices.Slice(tape, targets, sources, is_higher=True)
    if not part.inputs:
        return [], [None] * len(targets), [None] * len(sources)
    found = _Steps(len(part.arrays) + sum(len(step.outputs) for step in part.steps))
    for step in part.steps:
        operation = step.operation
        inputs = [(part.arrays[slot], slot) for slot in step.inputs]
        active = set(step.active_inputs)
        inputs = [(x, slot if i in active else None) for i, (x, slot) in enumerate(inputs)]
        outputs = [slot if i in step.active_outputs else None for i, slot in enumerate(step.outputs)]
        if operation.primitive.name in _PROGRAMS and not operation.subfuns and not operation.closed_over:
            found.open(operation.params["jaxpr"], inputs, outputs)
        else:
            is_rectifier = bool(operation.subfuns) and _is_rectifier(operation.subfuns[0])
            found.add(operation, operation.bind, inputs, operation.outputs, outputs, is_rectifier)
    return found.steps, part.target_slots, part.source_slots


class _Steps:
    def __init__(self, first_free):
        self.steps = []
        self._free = first_free

    def add(self, operation, bind, inputs, results, outputs, is_rectifier=False):
        if any(slot is not None for slot in outputs):
            self.steps.append(_Step(operation, bind, inputs, results, outputs, is_rectifier))

    def open(self, program, inputs, outputs):
        """Adds the steps of a program. Its operations are evaluated again, and their values have slots of their own."""
        jaxpr = jaxprs.opened(program)
        values, slots = {}, {}
        given = [*((x, None) for x in getattr(program, "consts", ())), *inputs]
        for var, (x, slot) in zip([*jaxpr.constvars, *jaxpr.invars], given, strict=True):
            values[var], slots[var] = x, slot
        for equation in jaxpr.eqns:
            given = [(v.val, None) if isinstance(v, Literal) else (values[v], slots[v]) for v in equation.invars]
            is_active = any(slot is not None for _, slot in given)
            results = jaxprs.bind(equation, [x for x, _ in given])
            out = []
            for var, x in zip(equation.outvars, results, strict=True):
                slot = self._next() if is_active and is_followable(x) else None
                values[var], slots[var] = x, slot
                out.append(slot)
            if not is_active or equation.primitive.name == "stop_gradient":
                continue
            if equation.primitive.name in _PROGRAMS:
                self.open(equation.params["jaxpr"], given, out)
            else:
                is_rectifier = _is_rectifier(jaxprs.opened(equation.params.get("call_jaxpr")))
                self.add(equation, functools.partial(jaxprs.bind, equation), given, results, out, is_rectifier)
        for var, slot in zip(jaxpr.outvars, outputs, strict=True):
            if slot is not None and not isinstance(var, Literal) and slots[var] is not None:
                self.steps.append(_Same(slots[var], slot, values[var]))

    def _next(self):
        self._free += 1
        return self._free - 1


def _is_rectifier(fun):
    """Whether a function with a custom derivative, or its program, is one of JAX's `relu` and `relu6`."""
    source = getattr(getattr(fun, "debug_info", None), "func_src_info", None) or ""
    return source.startswith(_RECTIFIERS) and "/jax/_src/nn/functions.py" in source


def _map_stacks(fun, stacks):
    # Directions are along axis 1, behind the examples, but along axis 0 of scalars.
    axes = [min(1, s.ndim - 1) for s in stacks]
    ranks = []

    def rows(*rows):
        results = fun(*rows)
        ranks.extend(x.ndim for x in results)
        return results

    found = jax.vmap(rows, axes, 0)(*stacks)
    return [x if rank == 0 else jax.numpy.swapaxes(x, 0, 1) for x, rank in zip(found, ranks, strict=True)]


class _JaxStep(steps.Step):
    """A step whose derivatives are those of JAX."""

    def push_stacks(self, stacks):
        return _map_stacks(lambda *tangents: self.jvp(self.call, self.primals, tangents), stacks)

    def second_derivatives(self, left, right):
        count = len(self.primals)

        def second(*tangents):
            first = lambda *x: self.jvp(self.call, x, tangents[:count])  # noqa: E731
            return self.jvp(first, self.primals, tangents[count:])

        return _map_stacks(second, [*left, *right])


class _Same(_JaxStep):
    """The result of a program, which has two slots: one inside and one outside of it."""

    kind = steps.LINEAR

    def __init__(self, inner, outer, x):
        self.inputs, self.outputs = (inner,), (outer,)
        self.primals = self.results = (x,)

    def call(self, x):
        return [x]

    def jvp(self, fun, primals, tangents):
        return jax.jvp(fun, primals, tangents)[1]

    def push_uniform(self, stacks):
        return stacks


class _Step(_JaxStep):
    def __init__(self, operation, bind, inputs, results, outputs, is_rectifier):
        self._primitive, self._params, self._bind = operation.primitive, operation.params, bind
        self._values = [x for x, _ in inputs]
        self._positions = [i for i, (_, slot) in enumerate(inputs) if slot is not None]
        self._active_outputs = [i for i, slot in enumerate(outputs) if slot is not None]
        self.inputs = tuple(inputs[i][1] for i in self._positions)
        self.outputs = tuple(outputs[i] for i in self._active_outputs)
        self.primals = tuple(self._values[i] for i in self._positions)
        self.results = tuple(results[i] for i in self._active_outputs)
        # Moduli of complex numbers are curved, and have another slope in each direction.
        is_complex = any(jax.numpy.iscomplexobj(x) for x in (*self.primals, *self.results))
        self.is_piecewise_linear = (is_rectifier or self._primitive.name in _PIECEWISE_LINEAR) and not is_complex
        self.kind, self.function = self._classified(is_complex)

    def _classified(self, is_complex):
        name, count = self._primitive.name, len(self._positions)
        if name in _LINEAR:
            return steps.LINEAR, None
        if name in _BILINEAR:
            if count == 1:
                return steps.LINEAR, None
            return (steps.PRODUCT if name == "mul" else steps.BILINEAR), None
        if name == "div" and self._positions == [0]:
            return steps.LINEAR, None
        is_elementwise = name in _ELEMENTWISE or name == "custom_jvp_call" and self.is_piecewise_linear
        if is_elementwise and count == 1 and not is_complex and self.primals[0].shape == self.results[0].shape:
            return steps.ELEMENTWISE, _CLOSED_FORMS.get(name)
        return steps.GENERAL, None

    def call(self, *active):
        values = list(self._values)
        for i, x in zip(self._positions, active, strict=True):
            values[i] = x
        outputs = self._bind(values)
        return [outputs[i] for i in self._active_outputs]

    def jvp(self, fun, primals, tangents):
        return sweep.push_one(self._primitive, self._params, fun, primals, tangents)

    def slope(self, fun, x):
        return self.jvp(fun, (x,), (jax.numpy.ones_like(x),))

    def push_uniform(self, stacks):
        rule = _UNIFORM.get(self._primitive.name)
        return rule and rule(self, stacks)

    def sum_of_products(self, first, second):
        if self._primitive.name != "dot_general":
            return None
        contracted, batch = self._params["dimension_numbers"]
        # The directions, at axis 1, are contracted with the others.
        contracted = tuple((1, *(i + (i > 0) for i in axes)) for axes in contracted)
        batch = tuple(tuple(i + (i > 0) for i in axes) for axes in batch)
        return [
            jax.lax.dot_general(
                first,
                second,
                (contracted, batch),
                self._params["precision"],
                self._params["preferred_element_type"],
            )
        ]


def _uniform_product(step, stacks):
    """A matrix of examples, one in each row, times a matrix that does not depend on the sources."""
    (left, _), batch = step._params["dimension_numbers"]
    if step._positions != [0] or step._values[0].ndim != 2 or tuple(left) != (1,) or any(batch):
        return None
    return _map_stacks(step.call, stacks)


def _uniform_sum(step, stacks):
    if any(x.shape != step.results[0].shape for x in step.primals):
        return None
    return steps.of_sum(stacks, step._positions == [1], -1 if step._primitive.name == "sub" else 1)


def _uniform_same(step, stacks):
    return _map_stacks(step.call, stacks)


def _uniform_columns(step, stacks):
    """A slice that keeps all examples."""
    params = step._params
    start, limit, strides = params["start_indices"], params["limit_indices"], params["strides"]
    if start[0] or limit[0] != step._values[0].shape[0] or strides and strides[0] != 1:
        return None
    count, strides = stacks[0].shape[1], strides and (1, *strides)
    return [jax.lax.slice(stacks[0], (0, 0, *start[1:]), (1, count, *limit[1:]), strides)]


_UNIFORM = {
    "add": _uniform_sum,
    "add_any": _uniform_sum,
    "sub": _uniform_sum,
    "dot_general": _uniform_product,
    "neg": _uniform_same,
    "convert_element_type": _uniform_same,
    "tape_alias": _uniform_same,
    "slice": _uniform_columns,
}
