"""Forward mode on JAX. For many tangents, each recorded operation is linearized only once."""

import jax

from keras_gradtools.backend.jax import current_trace, jaxprs, slices, sweep
from keras_gradtools.backend.jax.compiled_sweeps import compiled_sweeps


def pushforward(tape, targets, sources, tangents):
    return _push(sweep.push, tape, targets, sources, tangents)


def pushforward_batch(tape, targets, sources, tangents):
    return _push(sweep.push_batch, tape, targets, sources, tangents)


def linearize(tape, targets, sources, is_symmetric=False):
    _, values, places = tape.spread(sources, range(len(sources)))
    part = slices.Slice(tape, targets, values)
    if not part.inputs:
        return lambda tangents: [None] * len(targets)
    linear = _linearized(part)
    return lambda tangents: _by_target(part, linear(_by_input(part, [tangents[i] for i in places])))


def _push(mode, tape, targets, sources, tangents):
    _, values, tangents = tape.spread(sources, tangents)
    part = slices.Slice(tape, targets, values)
    if not part.inputs:
        return [None] * len(targets)
    return _by_target(part, sweep.differentiate(mode, part, _by_input(part, tangents)))


def _by_input(part, tangents):
    """The tangent for each input of the slice: the sum over the sources that are this same value."""
    summed = [None] * len(part.inputs)
    for slot, v in zip(part.source_slots, tangents, strict=True):
        if slot is not None:
            summed[slot] = v if summed[slot] is None else summed[slot] + v
    return summed


def _by_target(part, pushed):
    pushed = iter(pushed)
    return [None if slot is None else next(pushed) for slot in part.target_slots]


def _linearized(part):
    """Returns the forward mode of a `slices.Slice`, as a function of the tangents of its inputs."""
    try:
        if not part.steps or current_trace.is_traced(part.arrays.values()):
            linear = _linear_steps(part, part.arrays, ())
            return lambda tangents: _push_linear(part, linear, tangents)
        # Compiled on the first call, because a linearization is made to be used several times.
        linear = compiled_sweeps.run(_linear_steps, part, part.arrays, (), at_once=True)
    except (RuntimeError, ValueError) as error:
        sweep.raise_if_deleted(part, error)
        raise

    def push(tangents):
        if current_trace.is_traced([*jax.tree.leaves(linear), *tangents]):
            return _push_linear(part, linear, tangents)
        try:
            return compiled_sweeps.run(_push_linear, part, linear, tangents, at_once=True)
        except (RuntimeError, ValueError) as error:
            sweep.raise_if_deleted(part, error)
            raise

    return push


def _linear_steps(part, arrays, _):
    """Each step as a linear function of the tangents of its active inputs. All other work is done here."""
    return [_linear(step.operation, *step.split(arrays)) for step in part.steps]


def _linear(operation, fun, inputs):
    if not jaxprs.lacks_forward_mode(operation.primitive, operation.params):
        return jax.linearize(fun, *inputs)[1]
    # `custom_vjp` and similar operations have no forward mode. Their pullback is linear, so its own pullback is one.
    outputs, pullback = jax.vjp(fun, *inputs)
    _, push = jax.vjp(pullback, [jax.numpy.zeros_like(x) for x in outputs])
    return jax.tree_util.Partial(_apply, push)


def _apply(push, *directions):
    return push(directions)[0]


def _push_linear(part, linear, tangents):
    sums = dict(enumerate(tangents))
    for step, along in zip(part.steps, linear, strict=True):
        inputs = [(step.inputs[i], step.operation.inputs[i]) for i in step.active_inputs]
        directions = [sums[slot] if slot in sums else jax.numpy.zeros_like(x) for slot, x in inputs]
        sweep.add(sums, (step.outputs[i] for i in step.active_outputs), along(*directions))
    return [sums[slot] for slot in part.target_slots if slot is not None]
