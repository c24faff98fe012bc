"""Forward mode on a JAX tape for many tangents: each recorded operation is linearized only once."""

import jax

from keras_gradtools.backend import jax_programs, jax_sweep, jax_trace


def linearize(part):
    """Returns the forward mode of a `jax_sweep.Slice`, as a function of the tangents of its inputs."""
    try:
        if not part.steps or jax_trace.is_traced(part.arrays.values()):
            linear = _linear_steps(part, part.arrays, ())
            return lambda tangents: _push(part, linear, tangents)
        # Compiled on the first call, because a linearization is made to be used several times.
        linear = jax_sweep.compiled_sweeps.run(_linear_steps, part, part.arrays, (), at_once=True)
    except (RuntimeError, ValueError) as error:
        jax_sweep.raise_if_deleted(part, error)
        raise

    def push(tangents):
        if jax_trace.is_traced([*jax.tree.leaves(linear), *tangents]):
            return _push(part, linear, tangents)
        try:
            return jax_sweep.compiled_sweeps.run(_push, part, linear, tangents, at_once=True)
        except (RuntimeError, ValueError) as error:
            jax_sweep.raise_if_deleted(part, error)
            raise

    return push


def _linear_steps(part, arrays, _):
    """Each step as a linear function of the tangents of its active inputs. All other work is done here."""
    return [_linear(step.operation, *step.split(arrays)) for step in part.steps]


def _linear(operation, fun, inputs):
    if not jax_programs.lacks_forward_mode(operation.primitive, operation.params):
        return jax.linearize(fun, *inputs)[1]
    # `custom_vjp` and similar operations have no forward mode. Their pullback is linear, so its own pullback is one.
    outputs, pullback = jax.vjp(fun, *inputs)
    _, push = jax.vjp(pullback, [jax.numpy.zeros_like(x) for x in outputs])
    return jax.tree_util.Partial(_apply, push)


def _apply(push, *directions):
    return push(directions)[0]


def _push(part, linear, tangents):
    sums = dict(enumerate(tangents))
    for step, along in zip(part.steps, linear, strict=True):
        inputs = [(step.inputs[i], step.operation.inputs[i]) for i in step.active_inputs]
        directions = [sums[slot] if slot in sums else jax.numpy.zeros_like(x) for slot, x in inputs]
        jax_sweep.add(sums, (step.outputs[i] for i in step.active_outputs), along(*directions))
    return [sums[slot] for slot in part.target_slots if slot is not None]
