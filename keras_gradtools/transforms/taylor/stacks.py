"""Stacks: several derivatives of one value as one tensor, with an axis for the directions.

The directions are along axis `backend.STACK_AXIS`, or along axis 0 of a stack of scalars. Behind the batch axis, all
derivatives of one example are close to one another in memory, which some compilers make use of.
"""

from keras import ops

from keras_gradtools import backend


def axis(rank):
    """The axis of the directions in a stack of derivatives of a value of this rank."""
    return min(backend.STACK_AXIS, rank)


def rank(stack):
    """The rank of the value to which a stack belongs."""
    return len(stack.shape) - 1


def count(stack):
    """The number of directions."""
    return stack.shape[axis(rank(stack))]


def against(value, to=None):
    """`value` with an axis of size 1 for the directions, so that it multiplies stacks for values of rank `to`."""
    missing = (to or 0) - len(value.shape)
    if missing > 0:
        value = ops.reshape(value, (*(1,) * missing, *ops.shape(value)))
    return ops.expand_dims(value, axis(len(value.shape)))


def stretched(stack, to):
    """A stack for a value of rank `to`, to which NumPy's rules broadcast the value of this stack."""
    missing = to - rank(stack)
    if missing <= 0:
        return stack
    moved = ops.moveaxis(stack, axis(rank(stack)), 0)
    shape = ops.shape(moved)
    return ops.moveaxis(ops.reshape(moved, (shape[0], *(1,) * missing, *shape[1:])), 0, axis(to))


def summed(stack):
    """The sum over the directions."""
    return ops.sum(stack, axis=axis(rank(stack)))


def halves(stack):
    """The first half of the directions, and the second half."""
    place = axis(rank(stack))
    half = count(stack) // 2
    before = (slice(None),) * place
    return stack[(*before, slice(None, half))], stack[(*before, slice(half, None))]


def weighted(stack, weights):
    """A stack with each direction multiplied by a number."""
    place = axis(rank(stack))
    shape = [1] * len(stack.shape)
    shape[place] = -1
    return stack * ops.reshape(weights, shape)


def row(stack, number):
    """The derivative along one direction."""
    return stack[(*(slice(None),) * axis(rank(stack)), number)]


def of_rows(rows):
    """The stack of some derivatives of one value."""
    return ops.stack(rows, axis=axis(len(rows[0].shape)))


def zeros(stack, x):
    """Zeros for the directions of `stack`, as a stack for `x`."""
    place, shape = axis(len(x.shape)), ops.shape(x)
    return ops.zeros((*shape[:place], count(stack), *shape[place:]), dtype=x.dtype)


def with_examples(stack, x):
    """A stack that is equal for all examples, and has size 1 there, with its entries for each example of `x`."""
    place, shape = axis(len(x.shape)), ops.shape(x)
    return ops.broadcast_to(stack, (*shape[:place], stack.shape[place], *shape[place:]))


def of_directions(vectors):
    """The stack for an array of shape (directions, n), equal for all examples: tangents of points `(batch, n)`."""
    return ops.expand_dims(vectors, 1 - axis(2))
