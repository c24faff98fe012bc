"""An operation that a JAX tape has recorded, in a form that can be run again to differentiate it."""

from jax._src import core

from keras_gradtools.backend.jax import jaxprs, lifting

_WRITE_IN_PLACE = {"addupdate", "new_ref", "swap"}


class Operation:
    """A recorded operation: the primitive, its parameters, its inputs and its outputs.

    `subfuns`: The functions of a custom derivative, `(fun, jvp)` or `(fun, fwd, bwd)`. Empty for other operations.
    `differentiable`: The first inputs, through which derivatives pass. The others are known to have none.
    `rule`: For a custom gradient of this package, a hashable object that stands for its functions. Otherwise None.
    `closed_over`: How many of the last inputs are values that the operation closes over. They are not passed to it, and
    differentiating with respect to them is an error.
    """

    __slots__ = ("closed_over", "differentiable", "inputs", "outputs", "params", "primitive", "rule", "subfuns")

    def __init__(self, primitive, subfuns, params, inputs, outputs, rule=None, count=None, closed_over=()):
        if primitive.name in _WRITE_IN_PLACE:
            raise NotImplementedError(
                "A GradientTape cannot follow a value into a `jax.Ref`. Received: a value that is written into a Ref "
                "inside a tape's block. Compile the function that uses the Ref: `jax.jit(function)`."
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
        """Runs the operation again, under the current trace."""
        if self.closed_over:
            for x in inputs[-self.closed_over :]:
                lifting.closed_over_p.bind(x, by=jaxprs.named(self.primitive))
            inputs = inputs[: -self.closed_over]
        outputs = self._bind_custom(inputs) if self.subfuns else self.primitive.bind(*inputs, **self.params)
        return outputs if self.primitive.multiple_results else [outputs]

    def _bind_custom(self, inputs):
        # A wrapped function stores the structure of its output and refuses to do so twice, but here it runs again.
        reset(self.subfuns)
        # The arguments of `bind` differ between versions of JAX. Those of the method of the trace that it calls do not.
        with core.take_current_trace() as trace:
            process = trace.process_custom_jvp_call if len(self.subfuns) == 2 else trace.process_custom_vjp_call
            return process(self.primitive, *self.subfuns, inputs, **self.params)


def reset(subfuns):
    for subfun in subfuns:
        for store in subfun.stores:
            if store is not None:
                store.reset()


def with_closure(primitive, subfuns, params, inputs, outputs, constants, closed_over):
    """An `Operation` with the values that its programs or functions close over as inputs. None if there are none."""
    if not constants and not closed_over:
        return None
    if constants:
        try:
            params, inserted = lifting.constants_as_inputs(primitive, params, constants)
            inputs = lifting.insert(inputs, inserted, constants)
        except lifting.Unknown:
            closed_over = [*constants.values(), *closed_over]
    return Operation(primitive, subfuns, params, inputs, outputs, closed_over=closed_over)
