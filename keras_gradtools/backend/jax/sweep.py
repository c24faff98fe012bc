"""Differentiates the operations that a JAX tape has recorded, in reverse or forward mode.

A `Slice` holds the operations between the sources and the targets. A sweep over it lets JAX differentiate each one at
its recorded inputs, and chains the results. The user's function does not run again: an enclosing derivative would also
differentiate that second run.

Run eagerly, one operation at a time, a sweep is slower than the recorded block. So from the second time that the same
structure occurs, it is compiled, with all arrays as arguments. Inside `jax.jit`, the enclosing program compiles it.
"""

import jax
from jax._src.array import ArrayImpl

from keras_gradtools.backend.jax import current_trace, jaxprs
from keras_gradtools.backend.jax.compiled_sweeps import compiled_sweeps


def pull(part, arrays, cotangents):
    """Reverse mode: the gradient of each input of the slice."""
    sums = {}
    add(sums, (slot for slot in part.target_slots if slot is not None), cotangents)
    for step in reversed(part.steps):
        if not any(step.outputs[i] in sums for i in step.active_outputs):
            continue
        outputs = [(step.outputs[i], step.operation.outputs[i]) for i in step.active_outputs]
        fun, inputs = step.split(arrays)
        _, pullback = jax.vjp(fun, *inputs)
        gradients = pullback([sums[slot] if slot in sums else jax.numpy.zeros_like(x) for slot, x in outputs])
        add(sums, (step.inputs[i] for i in step.active_inputs), gradients)
    return [sums[slot] for slot in range(len(part.inputs))]


def pull_batch(part, arrays, cotangents):
    return _by_pieces(lambda rows: pull(part, arrays, rows), part, cotangents)


def push(part, arrays, tangents):
    """Forward mode: the derivative of each connected target."""
    sums = dict(enumerate(tangents))
    for step in part.steps:
        fun, inputs = step.split(arrays)
        slots = [step.inputs[i] for i in step.active_inputs]
        directions = [sums[slot] if slot in sums else jax.numpy.zeros_like(arrays[slot]) for slot in slots]
        pushed = push_one(step.operation.primitive, step.operation.params, fun, inputs, directions)
        add(sums, (step.outputs[i] for i in step.active_outputs), pushed)
    return [sums[slot] for slot in part.target_slots if slot is not None]


def push_batch(part, arrays, tangents):
    return _by_pieces(lambda rows: push(part, arrays, rows), part, tangents)


# On a CPU, the values of a sweep should fit into its caches: on a convolutional network, ten rows of 8 MiB each took
# 1.8 times as long at once as one by one. Small rows are slower in pieces, and many pieces take long to compile.
PIECE_BYTES = 2**24
LEAST_BYTES = 2**20
MOST_PIECES = 16


def _by_pieces(sweep, part, stacks):
    """Maps `sweep` over axis 0 of `stacks`, vectorized. On a CPU, large stacks are split into pieces for its caches."""
    count = step = stacks[0].shape[0]
    outputs = (step.operation.outputs[i] for step in part.steps for i in step.active_outputs)
    row_bytes = sum(x.size * x.dtype.itemsize for x in outputs)
    if row_bytes >= LEAST_BYTES and jax.default_backend() == "cpu":
        step = max(PIECE_BYTES // row_bytes, -(-count // MOST_PIECES))
    if step >= count:
        return jax.vmap(sweep)(stacks)
    pieces = [jax.vmap(sweep)([s[i : i + step] for s in stacks]) for i in range(0, count, step)]
    return [jax.numpy.concatenate(column) for column in zip(*pieces, strict=True)]


def push_one(primitive, params, fun, inputs, directions):
    """The derivative of `fun`, which calls an operation, along `directions`."""
    if not jaxprs.lacks_forward_mode(primitive, params):
        return jax.jvp(fun, inputs, directions)[1]
    # `custom_vjp` and similar operations have no forward mode. Their pullback is linear, so its own pullback is one.
    outputs, pullback = jax.vjp(fun, *inputs)
    _, push = jax.vjp(pullback, [jax.numpy.zeros_like(x) for x in outputs])
    return push(tuple(directions))[0]


def add(sums, slots, values):
    for slot, value in zip(slots, values, strict=True):
        sums[slot] = sums[slot] + value if slot in sums else value


def differentiate(mode, part, vectors):
    """Runs `mode`, such as `pull` or `push`, on a slice, compiled if the same structure has occurred before."""
    try:
        if not part.steps or current_trace.is_traced([*part.arrays.values(), *vectors]):
            return mode(part, part.arrays, vectors)
        return compiled_sweeps.run(mode, part, part.arrays, vectors)
    except (RuntimeError, ValueError) as error:
        raise_if_deleted(part, error)
        raise


def raise_if_deleted(part, error):
    """Raises a clearer error if a recorded array was deleted, which then caused `error`."""
    gone = [x for x in part.arrays.values() if isinstance(x, ArrayImpl) and x.is_deleted()]
    if gone:
        raise RuntimeError(
            "This derivative needs a value that the tape's block has used and that no longer exists. Received: a "
            f"recorded array of shape {gone[0].shape} and dtype {gone[0].dtype}, which was deleted since. On JAX, "
            "`fit`, `train_on_batch` and other compiled steps delete the arrays of the variables that they update. "
            "Take the derivative before, or record the block again with the current values."
        ) from error
