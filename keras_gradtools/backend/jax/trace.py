"""The JAX trace by which a tape records operations.

JAX has no tape, but it asks the current trace to run every operation. While a tape is open, a `TapeTrace` is the
current trace. It lets its parent run the operation, so the values that the user sees do not change: they are arrays, or
tracers of an enclosing `jax.jit`. Then it adds the operation to each tape that follows one of the inputs. Tapes follow
values by identity, so an operation must never return its input itself. If it does, the output is replaced by an alias.

An operation may also depend on values that it closes over. In programs (`jax.jit`, and loops around it) these are
constants: see `jaxprs`. For functions of a custom derivative, a `ClosureTrace` observes them while they run.

Together with `jaxprs` and `custom_calls`, this file uses most of JAX's private code: `jax._src.core.Trace`
with `process_primitive`, `process_custom_jvp_call`, `process_custom_vjp_call`, `stage_value` and `requires_low`,
`Primitive.is_high` and `to_lojax`, `trace_ctx`, `parent_trace` of other traces, `WrappedFun`, and the constructor of
`ArrayImpl`. `make test-versions` tests it with the oldest and the newest supported JAX.
"""

import contextlib
import threading

import jax
from jax._src import ad_util, core
from jax._src import linear_util as lu
from jax._src.array import ArrayImpl

from keras_gradtools.backend.jax import custom_calls, jaxprs
from keras_gradtools.backend.jax.aliases import alias, is_followable
from keras_gradtools.backend.jax.operation import Operation, reset, with_closure
from keras_gradtools.blocks import Block

# If a variable is read while JAX traces a program, its array becomes a constant of the program, and the Python code
# that reads the variable does not run again. For the id of each such array, this has a function that makes tapes follow
# it as the value of the variable.
reads_by_programs: dict = {}


class TapeTrace(core.Trace):
    """Lets `parent` run every operation, and adds it to each recording tape that follows one of its inputs."""

    __slots__ = ("open_tapes", "parent", "tapes")

    def __init__(self, parent):
        super().__init__()
        # Ask for high-level primitives before JAX expands them: the expansion would not have their derivatives.
        self.requires_low = False  # type: ignore[misc]
        self.parent = parent
        self.open_tapes = []
        self.tapes = []

    def stage_value(self, val):
        return self.parent.stage_value(val)

    def cur_qdd(self, x):
        return self.parent.cur_qdd(x)

    def process_primitive(self, primitive, tracers, params, /):
        programs, is_high, closed_over = (), False, ()
        if primitive not in _plain:
            programs = jaxprs.programs_of(primitive, params)
            is_high = jaxprs.is_high(primitive, tracers, params, programs)
            if programs == () and not is_high:
                _plain.add(primitive)
        if is_high and self.parent.requires_low:
            outputs, closed_over = self._lowered(primitive, tracers, params)
        else:
            # Other traces may call this with this trace as the current one. Then the operations by which the parent
            # runs the primitive would come back here, and be recorded in addition.
            outputs = _in_nobodys_place(self.parent.process_primitive, primitive, tracers, params)
        if primitive.multiple_results:
            return self._record(primitive, (), params, tracers, outputs, programs, closed_over)
        return self._record(primitive, (), params, tracers, [outputs], programs, closed_over)[0]

    def _lowered(self, primitive, tracers, params):
        with core.set_current_trace(self.parent):
            if not self.tapes:
                return primitive.to_lojax(*tracers, **params), ()
            observation = _Observation(self.tapes)
            inputs = [alias(x) if observation.follows(x) else x for x in tracers]
            with observation():
                outputs = primitive.to_lojax(*inputs, **params)
            if primitive.name == "call_hi_primitive":
                outputs = [_distinct(x) for x in outputs]
            return outputs, list(observation.found.values())

    def process_call(self, primitive, fun, tracers, params, /):
        with core.set_current_trace(self):
            return fun.call_wrapped(*tracers)

    def process_shard_map(self, *_, **__):
        raise NotImplementedError(
            "A GradientTape cannot follow `jax.shard_map` when it runs eagerly. Received: a call of it inside a tape's "
            "block. Compile it: `jax.jit(jax.shard_map(...))`."
        )

    def process_custom_jvp_call(self, primitive, fun, jvp, tracers, /, *, symbolic_zeros):
        if self.tapes and custom_calls.is_batched(fun):
            call = custom_calls.jvp_by_program(jvp.call_wrapped, tracers, symbolic_zeros, self._may_be_perturbed)
            with core.set_current_trace(self):
                return call(*tracers)
        params = {"symbolic_zeros": symbolic_zeros}
        return self._process_custom(self.parent.process_custom_jvp_call, primitive, (fun, jvp), tracers, params)

    def process_custom_vjp_call(self, primitive, fun, fwd, bwd, tracers, /, *, out_trees, symbolic_zeros):
        subfuns = fun, fwd, bwd
        params = {"out_trees": out_trees, "symbolic_zeros": symbolic_zeros}
        if self.tapes and custom_calls.is_batched(fun):
            bind = Operation(primitive, subfuns, params, tracers, None).bind
            call = custom_calls.vjp_by_programs(bind, tracers)
            with core.set_current_trace(self):
                return call(*tracers)
        return self._process_custom(self.parent.process_custom_vjp_call, primitive, subfuns, tracers, params)

    def _may_be_perturbed(self, x):
        return self.parent is not core.eval_trace or any(id(x) in tape.followed for tape in self.tapes)

    def _process_custom(self, process, primitive, subfuns, tracers, params):
        with core.take_current_trace():
            is_ours = _thread.custom_rule[0] is not None
            if not self.tapes or is_ours or custom_calls.closes_over_nothing(subfuns[0]):
                outputs = process(primitive, *subfuns, tracers, **params)
                return self._record(primitive, subfuns, params, tracers, outputs)
            fun = _observed(subfuns[0], observation := _Observation(self.tapes))
            outputs = [_distinct(x) for x in process(primitive, fun, *subfuns[1:], tracers, **params)]
            if not observation.has_run:
                # The parent differentiates, so it ran the rule instead of the function.
                jax.make_jaxpr(fun.call_wrapped)(*tracers)
                reset(subfuns[:1])
        return self._record(primitive, subfuns, params, tracers, outputs, (), list(observation.found.values()))

    def _record(self, primitive, subfuns, params, inputs, outputs, programs=(), closed_over=()):
        outputs = list(outputs)
        taken = {id(x) for x in inputs}
        for i, x in enumerate(outputs):
            if id(x) in taken and isinstance(x, (ArrayImpl, core.Tracer)):
                outputs[i] = x = alias(x)
            taken.add(id(x))
        if self.tapes and primitive is not ad_util.stop_gradient_p:
            rule, count = _thread.custom_rule if subfuns else (None, None)
            operation = None
            if programs or closed_over:
                constants = self._followed_constants(programs)
                operation = with_closure(primitive, subfuns, params, inputs, outputs, constants, closed_over)
            differentiable = operation.differentiable if operation else inputs[:count]
            for tape in self.tapes:
                if any(id(x) in tape.followed for x in differentiable):
                    operation = operation or Operation(primitive, subfuns, params, inputs, outputs, rule, count)
                    tape.operations.append(operation)
                    tape.followed.update((id(x), x) for x in outputs if is_followable(x))
        return outputs

    def _followed_constants(self, programs):
        found = {}
        for program in programs:
            for x in jaxprs.constants(program):
                if id(x) in reads_by_programs:
                    reads_by_programs[id(x)](x, self.tapes)
                if any(id(x) in tape.followed for tape in self.tapes):
                    found[id(x)] = x
        return found


def _distinct(x):
    """A result of a function with a custom derivative as a new array: it may be an input itself, or a number."""
    if isinstance(x, ArrayImpl):
        return alias(x)
    is_number = not isinstance(x, jax.Array) and (hasattr(x, "dtype") or isinstance(x, (int, float)))
    return jax.numpy.asarray(x) if is_number else x


# The primitives that are known to have no programs in their parameters, which are most of them.
_plain: set = set()


class ClosureTrace(TapeTrace):
    """Notes which values that tapes follow are read by a function whose operations the tapes do not record."""

    __slots__ = ("observations",)

    def __init__(self, parent):
        super().__init__(parent)
        self.observations = []

    def _record(self, primitive, subfuns, params, inputs, outputs, programs=(), closed_over=()):
        if primitive is not ad_util.stop_gradient_p:
            constants = [x for program in programs for x in jaxprs.constants(program)]
            self.observations[-1].note([*inputs, *constants, *closed_over])
        return super()._record(primitive, subfuns, params, inputs, outputs, programs, closed_over)


class _Observation:
    """The values followed by `tapes` that one function closes over."""

    def __init__(self, tapes):
        self.tapes = list(tapes)
        self.found = {}
        self.has_run = False

    def follows(self, x):
        return any(id(x) in tape.followed for tape in self.tapes)

    def note(self, values):
        self.found.update((id(x), x) for x in values if self.follows(x))

    @contextlib.contextmanager
    def __call__(self):
        """A block in which operations that run under the current trace are observed."""
        self.has_run = True
        parent = core.trace_ctx.trace
        trace = _thread.eager_closure if parent is core.eval_trace else ClosureTrace(parent)
        trace.observations.append(self)
        try:
            with core.set_current_trace(trace):
                yield
        finally:
            trace.observations.pop()


@lu.transformation2
def _observed(fun, observation, *args):
    # Aliases for the arguments, so that an argument that is also closed over can be told apart.
    with observation():
        return fun(*[alias(x) if observation.follows(x) else x for x in args])


def _in_nobodys_place(process, *args, **kwargs):
    """Calls `process` without a current trace. Unlike JAX's context manager, it is safe against an interrupt."""
    before = core.trace_ctx.trace
    try:
        core.trace_ctx.set_trace(core.eval_trace)
        return process(*args, **kwargs)
    finally:
        core.trace_ctx.set_trace(before)


class _Thread(threading.local):
    def __init__(self):
        # One for the whole thread, because the current trace is part of the keys of JAX's caches.
        self.eager_closure = ClosureTrace(core.eval_trace)
        self.custom_rule = (None, None)


_thread = _Thread()


class custom_rule(Block):  # noqa: N801 - said of a block
    """A block in which a custom derivative that is called is recorded as `rule`.

    Only its first `count` inputs have a derivative. For the others, the rule returns None, at which JAX stops. But a
    tape chains single operations, and would get an array of zeros, which becomes NaN where it meets an infinity.
    """

    def __init__(self, rule, count):
        self._rule, self._before = (rule, count), _thread.custom_rule

    def begin(self):
        _thread.custom_rule = self._rule

    def end(self):
        _thread.custom_rule = self._before
