"""One operation that a JAX tape has recorded, in a form that can be carried out again."""

from jax._src import core

from keras_gradtools.backend import jax_programs

_WRITE_IN_PLACE = {"addupdate", "new_ref", "swap"}


class Operation:
    """One recorded operation: what to bind again, on which inputs, and what came out.

    `subfuns` are the functions of a custom derivative: `(fun, jvp)`, `(fun, fwd, bwd)`, else nothing.
    Derivatives pass through `differentiable`, the inputs up to the first that is known to have none. `rule`
    stands for the functions of a custom derivative of our own, by value; else it is None. The last `closed_over`
    inputs are not given to the operation: it closes over them, and has no derivative by them.
    """

    __slots__ = ("closed_over", "differentiable", "inputs", "outputs", "params", "primitive", "rule", "subfuns")

    def __init__(self, primitive, subfuns, params, inputs, outputs, rule=None, count=None, closed_over=()):
        if primitive.name in _WRITE_IN_PLACE:
            raise NotImplementedError(
                "A GradientTape cannot follow a value into a `jax.Ref`. Received: one that is written into a Ref "
                "inside a tape's block. Compile what the Ref is for: `jax.jit(function)`."
            )
        self.primitive = primitive
        self.subfuns = subfuns
        self.params = params
        self.inputs = [*inputs, *closed_over] if closed_over else inputs
        self.outputs = outputs
        self.rule = rule
        self.differentiable = self.inputs[:count]
        self.closed_over = len(closed_over)

    def bind(self, inputs):
        """Carries the operation out again, under the current trace."""
        if self.closed_over:
            for x in inputs[-self.closed_over :]:
                jax_programs.closed_over_p.bind(x, by=jax_programs.named(self.primitive))
            inputs = inputs[: -self.closed_over]
        outputs = self._bind_custom(inputs) if self.subfuns else self.primitive.bind(*inputs, **self.params)
        return outputs if self.primitive.multiple_results else [outputs]

    def _bind_custom(self, inputs):
        # A wrapped function notes the structure of its output once; here it runs a second time.
        reset(self.subfuns)
        # How `bind` takes functions differs from one JAX to the next; what it comes to does not.
        with core.take_current_trace() as trace:
            process = trace.process_custom_jvp_call if len(self.subfuns) == 2 else trace.process_custom_vjp_call
            return process(self.primitive, *self.subfuns, inputs, **self.params)


def reset(subfuns):
    for subfun in subfuns:
        for store in subfun.stores:
            if store is not None:
                store.reset()


def with_closure(primitive, subfuns, params, inputs, outputs, constants, closed_over):
    """An operation that takes in what its programs or its functions close over; None if that is nothing."""
    if not constants and not closed_over:
        return None
    if constants:
        try:
            params, inserted = jax_programs.constants_as_inputs(primitive, params, constants)
            inputs = jax_programs.insert(inputs, inserted, constants)
        except jax_programs.Unknown:
            closed_over = [*constants.values(), *closed_over]
    return Operation(primitive, subfuns, params, inputs, outputs, closed_over=closed_over)
