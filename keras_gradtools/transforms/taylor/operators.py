"""The Laplacian and the divergence of a function of points, with its value, from one recorded call."""

import functools
import math

from keras import ops

from keras_gradtools import backend, validation
from keras_gradtools.transforms.first_order import jvp_named
from keras_gradtools.transforms.taped_call import TapedCall
from keras_gradtools.transforms.taylor import collapsed, elementwise, stacks
from keras_gradtools.transforms.taylor.collapsed import Carried, Sum
from keras_gradtools.transforms.taylor.directions import Directions, along_axes, along_vectors, spread, unit_vectors
from keras_gradtools.transforms.taylor.kinks import warn_of_kinks


def laplacian_of(value, x, axes, coefficients, chunks):
    """Returns `value(x)` and its Laplacian along `axes`, non-negative indices, with the given coefficients."""
    return _summed_over(value, x, along_axes(x, axes, coefficients), chunks)


def laplacian_estimate_of(value, x, axes, sampling, vectors, coefficients, chunks):
    """Returns `value(x)` and an estimate of its Laplacian, from the random directions `vectors`, one in each row.

    The estimate is a mean, or the pair of a mean and its standard error.
    """
    directions = along_vectors(x, axes, vectors, coefficients, sampling.is_on_axes)
    if not sampling.return_standard_error:
        out, total = _summed_over(value, x, directions, chunks)
        return out, total / sampling.samples
    out, samples = _summed_over(value, x, directions, chunks, apart=True)
    return out, sampling.estimate(samples, len(axes))


def divergence_of(value, x, axes, chunks):
    """Returns `value(x)` and its divergence: the sum of the derivatives of output k along axis number k."""

    def of_chunk(stack, along):
        if stacks.count(stack) < len(axes):
            return ops.sum(stack * stacks.of_directions(along), axis=(stacks.axis(2), 2))[:, None]
        return sum(stacks.row(stack, k)[:, k] for k in range(len(axes)))[:, None]

    units = ops.eye(len(axes), dtype=x.dtype)
    out, found = _along(value, x, axes, unit_vectors(x, axes), units, chunks, of_chunk, _sum)
    return out, ops.zeros_like(x[:, :1]) if found is None else found


def divergence_estimate_of(value, x, axes, sampling, vectors, chunks):
    """Returns `value(x)` and an estimate of its divergence: a mean, or a mean and its standard error."""

    def of_chunk(stack, along):
        samples = ops.sum(stack * stacks.of_directions(along), axis=-1, keepdims=True)
        return ops.moveaxis(samples, stacks.axis(2), 0)

    join = functools.partial(_rows, sampling.samples)
    out, samples = _along(value, x, axes, spread(x, axes, vectors), vectors, chunks, of_chunk, join)
    if samples is None:
        samples = ops.zeros((sampling.samples, ops.shape(x)[0], 1), dtype=x.dtype)
    return out, sampling.estimate(samples, len(axes))


def _summed_over(value, x, directions, chunks, apart=False):
    """Returns `value(x)` and the sum of second derivatives. With `apart`, all of them, along axis 0."""
    call, operations = _recorded("laplacian", value, x)
    y = call.target
    _require_output(y)
    parts = _taken_apart(call, operations)
    size = chunks.size(parts and parts[0], directions.count, directions.right is not None)
    if parts is None:
        is_known = None not in tuple(y.shape)[1:]
        samples = (_nested_laplacian if is_known else _laplacian_by_directions)(value, x, directions, chunks, size)
        return call.value, samples if apart else ops.sum(samples, axis=0)

    def of_chunk(left, right, weights):
        part = Directions.of_rows(left, right, weights)
        carried = _at_target(parts, *part.start(apart))
        if carried is None or carried.summed is None:
            return None
        if not apart:
            return _of_shape(carried.summed, y)
        samples = ops.moveaxis(carried.summed, stacks.axis(stacks.rank(carried.summed)), 0)
        return ops.broadcast_to(samples, (part.count, *ops.shape(y)))

    if size < directions.count:
        elementwise.remember(parts[0], 2)
    join = functools.partial(_rows, directions.count) if apart else _sum
    found = chunks.mapped(of_chunk, directions.rows(), directions.count, size, join)
    if found is None:
        warn_of_kinks("laplacian", parts[0])
        found = ops.zeros((directions.count, *ops.shape(y)) if apart else ops.shape(y), dtype=y.dtype)
    return call.value, found


def _of_shape(x, y):
    is_same = None not in (*x.shape, *y.shape) and tuple(x.shape) == tuple(y.shape)
    return x if is_same else ops.broadcast_to(x, ops.shape(y))


def _sum(found):
    """The sum over all chunks."""
    return ops.sum(found, axis=0)


def _rows(count, found):
    """The rows of all chunks, without those that fill the last one up."""
    return ops.reshape(found, (-1, *ops.shape(found)[2:]))[:count]


def _along(value, x, axes, vectors, outputs, chunks, of_chunk, join):
    """Returns `value(x)` and `of_chunk(stack, rows of outputs)` for each chunk of the first derivatives by `vectors`.

    The second is None if they are all zero.
    """
    call, operations = _recorded("divergence", value, x)
    y = call.target
    _require_field(y, axes)
    parts = _taken_apart(call, operations)

    def first_derivatives(rows):
        if parts is not None:
            found = _at_target(parts, Carried(stacks.of_directions(rows), None, True), Sum(order=1))
            return None if found is None else collapsed.full(found, y).first
        stack = ops.broadcast_to(rows[:, None], (rows.shape[0], *ops.shape(x)))
        (first,) = backend.pushforward_batch(call.tape, call.flat_targets, call.flat_sources, [stack])
        return None if first is None else ops.moveaxis(first, 0, stacks.axis(2))

    def derivatives(rows, along):
        first = first_derivatives(rows)
        return None if first is None else of_chunk(first, along)

    size = chunks.size(parts and parts[0], vectors.shape[0])
    return call.value, chunks.mapped(derivatives, (vectors, outputs), vectors.shape[0], size, join)


def _recorded(name, value, x):
    operations = backend.operations()
    return TapedCall(name, value, (x,), operations=operations), operations


def _taken_apart(call, operations):
    return backend.steps_between(call.tape, operations, call.flat_targets, call.flat_sources)


def _at_target(parts, carried, kind):
    steps, (target,), (source,) = parts
    if target is None or source is None:
        return None
    return collapsed.push(steps, [source], [carried], kind, target)


def _require_output(y):
    if not ops.is_tensor(y) or not len(y.shape):
        raise ValueError(f"laplacian expects one output, of shape (batch, ...). Received: {validation.describe(y)}.")


def _require_field(y, axes):
    shape = tuple(getattr(y, "shape", ()))
    if len(shape) != 2 or shape[1] != len(axes):
        raise ValueError(
            f"divergence expects outputs of shape (batch, {len(axes)}), one for each axis. Received: shape {shape}."
        )


def _unit(like, element):
    """Zeros in the shape of `like`, with a one at the element number `element` of each example."""
    shape = tuple(like.shape)[1:]
    one = ops.reshape(ops.one_hot(element, math.prod(shape), dtype=like.dtype), (1, *shape))
    return ops.broadcast_to(one, ops.shape(like))


def _nested_laplacian(value, x, directions, chunks, size):
    """The gradient of each output element, then its derivatives along all directions at once, or by chunks of them."""

    def gradients(x):
        call = TapedCall("laplacian", value, (x,))
        shapes.append(call.target.shape)
        return [call.vjp(_unit(call.target, k)) for k in range(math.prod(call.target.shape[1:]))]

    def of_chunk(*rows):
        left, right = Directions.of_rows(*rows).pairs(x)
        columns = []
        for gradient in outer.target:
            (along,) = backend.pullback_batch(outer.tape, [gradient], outer.flat_sources, [left])
            columns.append(ops.zeros_like(left[:, :, 0]) if along is None else ops.sum(along * right, axis=-1))
        return ops.stack(columns, axis=2)

    shapes: list = []
    outer = TapedCall("laplacian", gradients, (x,))
    shape = directions.count, ops.shape(x)[0], *shapes[-1][1:]
    if not outer.target:
        return ops.zeros(shape, dtype=x.dtype)
    join = functools.partial(_rows, directions.count)
    return ops.reshape(chunks.mapped(of_chunk, directions.rows(), directions.count, size, join), shape)


def _laplacian_by_directions(value, x, directions, chunks, size):
    """Second derivatives along one direction at a time, for an output whose size is not known."""
    left, right = directions.pairs(x)
    found = []
    for i in range(directions.count):

        def first(x, direction=left[i]):
            return jvp_named("laplacian", value, (x,), (direction,))[1]

        found.append(jvp_named("laplacian", first, (x,), (right[i],))[1])
    return ops.stack(found, axis=0)
