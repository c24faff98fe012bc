"""The JAX trace that a tape records with: the one file that touches JAX's internals.

JAX has no tape, but every operation asks the *current trace* to carry it out. `TapeTrace` stands in that
place while a tape is open: it has its parent carry the operation out, so that the values in the user's
hands stay what they would have been (arrays, or the tracers of an enclosing `jax.jit`), and notes the
operation on each tape that follows one of its inputs. Values are followed by identity, which holds only if
no operation hands an input back as its output; where JAX does that, the output becomes an alias.

Tested with the oldest and the newest JAX that the package supports (`make test-versions`). What it relies
on: `jax._src.core.Trace` with `process_primitive`, `process_custom_jvp_call`, `process_custom_vjp_call` and
`stage_value`; `trace_ctx`; `parent_trace` of the other traces; the constructor of `ArrayImpl`.
"""

import threading

import jax
from jax._src import ad_util, core
from jax._src.array import ArrayImpl
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from keras_gradtools.backend.blocks import Block

alias_p = Primitive("tape_alias")
alias_p.def_impl(lambda x: x)
alias_p.def_abstract_eval(lambda x: x)
ad.deflinear2(alias_p, lambda cotangent, _: [cotangent])
batching.defvectorized(alias_p)
mlir.register_lowering(alias_p, lambda _, x: [x])


def alias(x):
    """Returns another object for the same value, without a copy."""
    if isinstance(x, core.Tracer):
        return x._trace.process_primitive(alias_p, [x], {})
    return ArrayImpl(x.aval, x.sharding, x._arrays, committed=x._committed, _skip_checks=True)


def recorded_alias(x):
    """Returns another object for the same value, and lets the tapes that follow `x` follow it too."""
    other = alias_p.bind(x)
    return alias(x) if other is x else other


def needs_alias(x):
    """Whether a tape might take `x` for another value: any array; a tracer only where a tape is open.

    Elsewhere nothing of ours may get into a program: exporters know JAX's own primitives alone.
    """
    if isinstance(x, core.Tracer):
        return is_followable(x) and isinstance(core.trace_ctx.trace, TapeTrace)
    return isinstance(x, ArrayImpl) and is_followable(x)


def is_followable(x):
    """Whether a tape can follow `x`: an array or tracer with a derivative."""
    return isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.numpy.inexact)


class Operation:
    """One recorded operation: what to bind again, on which inputs, and what came out.

    `subfuns` are the functions of a custom derivative: `(fun, jvp)`, `(fun, fwd, bwd)`, else nothing.
    Derivatives pass through `differentiable`, the inputs up to the first that is known to have none. `rule`
    stands for the functions of a custom derivative of our own, by value; else it is None.
    """

    __slots__ = ("differentiable", "inputs", "outputs", "params", "primitive", "rule", "subfuns")

    def __init__(self, primitive, subfuns, params, inputs, outputs, rule, differentiable):
        self.primitive = primitive
        self.subfuns = subfuns
        self.params = params
        self.inputs = inputs
        self.outputs = outputs
        self.rule = rule
        self.differentiable = differentiable

    def bind(self, inputs):
        """Carries the operation out again, under the current trace."""
        outputs = self._bind_custom(inputs) if self.subfuns else self.primitive.bind(*inputs, **self.params)
        return outputs if self.primitive.multiple_results else [outputs]

    def _bind_custom(self, inputs):
        for subfun in self.subfuns:
            # A wrapped function notes the structure of its output once; here it runs a second time.
            for store in subfun.stores:
                if store is not None:
                    store.reset()
        # How `bind` takes functions differs from one JAX to the next; what it comes to does not.
        with core.take_current_trace() as trace:
            process = trace.process_custom_jvp_call if len(self.subfuns) == 2 else trace.process_custom_vjp_call
            return process(self.primitive, *self.subfuns, inputs, **self.params)


class TapeTrace(core.Trace):
    """Has `parent` carry out every operation, and notes it on the tapes that are recording."""

    __slots__ = ("open_tapes", "parent", "tapes")

    def __init__(self, parent):
        super().__init__()
        self.parent = parent
        self.open_tapes = []
        self.tapes = []

    def stage_value(self, val):
        return self.parent.stage_value(val)

    def cur_qdd(self, x):
        return self.parent.cur_qdd(x)

    def process_primitive(self, primitive, tracers, params, /):
        # JAX's other traces may come here with this one as the current trace, and the parent then would come
        # back to it with what the operation is made of: it would be recorded twice.
        outputs = _in_nobodys_place(self.parent.process_primitive, primitive, tracers, params)
        if primitive.multiple_results:
            return self._record(primitive, (), params, tracers, outputs)
        return self._record(primitive, (), params, tracers, [outputs])[0]

    def process_call(self, primitive, fun, tracers, params, /):
        with core.set_current_trace(self):
            return fun.call_wrapped(*tracers)

    def process_shard_map(self, *_, **__):
        raise NotImplementedError(
            "A GradientTape cannot follow `jax.shard_map` that runs eagerly. Received: a call of it inside a tape's "
            "block. Compile it: `jax.jit(jax.shard_map(...))`."
        )

    def process_custom_jvp_call(self, primitive, fun, jvp, tracers, /, *, symbolic_zeros):
        params = {"symbolic_zeros": symbolic_zeros}
        outputs = _in_nobodys_place(self.parent.process_custom_jvp_call, primitive, fun, jvp, tracers, **params)
        return self._record(primitive, (fun, jvp), params, tracers, outputs)

    def process_custom_vjp_call(self, primitive, fun, fwd, bwd, tracers, /, *, out_trees, symbolic_zeros):
        params = {"out_trees": out_trees, "symbolic_zeros": symbolic_zeros}
        outputs = _in_nobodys_place(self.parent.process_custom_vjp_call, primitive, fun, fwd, bwd, tracers, **params)
        return self._record(primitive, (fun, fwd, bwd), params, tracers, outputs)

    def _record(self, primitive, subfuns, params, inputs, outputs):
        outputs = list(outputs)
        taken = {id(x) for x in inputs}
        for i, x in enumerate(outputs):
            if id(x) in taken and isinstance(x, (ArrayImpl, core.Tracer)):
                outputs[i] = x = alias(x)
            taken.add(id(x))
        if self.tapes and primitive is not ad_util.stop_gradient_p:
            rule, count = _thread.custom_rule if subfuns else (None, None)
            differentiable = inputs[:count]
            operation = None
            for tape in self.tapes:
                if any(id(x) in tape.followed for x in differentiable):
                    operation = operation or Operation(
                        primitive, subfuns, params, inputs, outputs, rule, differentiable
                    )
                    tape.operations.append(operation)
                    tape.followed.update((id(x), x) for x in outputs if is_followable(x))
        return outputs


def _in_nobodys_place(process, *args, **kwargs):
    """Calls `process` as if no trace were the current one; as JAX's own context manager, which can be interrupted."""
    before = core.trace_ctx.trace
    try:
        core.trace_ctx.set_trace(core.eval_trace)
        return process(*args, **kwargs)
    finally:
        core.trace_ctx.set_trace(before)


class _Thread(threading.local):
    def __init__(self):
        # One for all eager tapes of the thread: JAX keys caches by the current trace.
        self.eager = TapeTrace(core.eval_trace)
        self.custom_rule = (None, None)


_thread = _Thread()


class custom_rule(Block):  # noqa: N801 - said of a block
    """Says that the custom derivative called in the block is `rule`, and one by its first `count` inputs only.

    JAX takes a gradient of None for a zero that stops; to a tape, which chains single operations, it would be
    an array of zeros, and NaN once it meets an infinity.
    """

    def __init__(self, rule, count):
        self._rule, self._before = (rule, count), _thread.custom_rule

    def begin(self):
        _thread.custom_rule = self._rule

    def end(self):
        _thread.custom_rule = self._before


def trace_here():
    """The trace that a tape has to record with here: the current one, if it is a tape's."""
    current = core.trace_ctx.trace
    if isinstance(current, TapeTrace):
        return current
    return _thread.eager if current is core.eval_trace else TapeTrace(current)


def enter(trace, tape):
    """Makes `trace` the current one, until `tape` leaves it."""
    trace.open_tapes.append(tape)
    core.trace_ctx.set_trace(trace)


def leave(trace, tape):
    """Gives the place back to the parent once the last tape has left, in whatever order they leave."""
    while tape in trace.open_tapes:
        trace.open_tapes.remove(tape)
    if not trace.open_tapes and core.trace_ctx.trace is trace:
        core.trace_ctx.set_trace(trace.parent)


def is_eager():
    """Whether operations are carried out at once: outside of every transformation of JAX."""
    return core.trace_ctx.trace in (core.eval_trace, _thread.eager)


def is_visible(x, trace):
    """Whether `x` is a value of the level that `trace` records, or of one around it."""
    if not isinstance(x, core.Tracer):
        return True
    level = trace.parent
    while level is not None:
        if level is x._trace:
            return True
        level = getattr(level, "parent_trace", None) or getattr(level, "parent", None)
    return False


def is_traced(values):
    return any(isinstance(x, core.Tracer) for x in values)


def has_primitive(operation, name):
    """Whether a recorded operation is the primitive `name`, or a program that contains it."""
    return operation.primitive.name == name or any(
        _contains(jaxpr, {name}) for jaxpr in core.jaxprs_in_params(operation.params)
    )


def _contains(jaxpr, names):
    return any(
        equation.primitive.name in names or any(_contains(j, names) for j in core.jaxprs_in_params(equation.params))
        for equation in jaxpr.eqns
    )


def text_of(closed_jaxpr):
    """A text that two programs share only if they compute the same; empty where the text does not tell."""
    # Constants are not printed, and of a custom derivative or a callback only the name is.
    hidden = {"custom_jvp_call", "custom_vjp_call", "pure_callback", "io_callback", "debug_callback"}
    if closed_jaxpr.consts or _contains(closed_jaxpr.jaxpr, hidden):
        return ""
    return str(closed_jaxpr)
