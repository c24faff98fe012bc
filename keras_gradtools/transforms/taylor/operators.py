"""The Laplacian and the divergence of a function of points, with its value, from one recorded call."""

import math

from keras import ops

from keras_gradtools import backend, validation
from keras_gradtools.transforms.first_order import jvp_named
from keras_gradtools.transforms.taped_call import TapedCall
from keras_gradtools.transforms.taylor import collapsed, stacks
from keras_gradtools.transforms.taylor.collapsed import Carried, Sum
from keras_gradtools.transforms.taylor.directions import along_axes, along_vectors, spread, unit_vectors
from keras_gradtools.transforms.taylor.kinks import warn_of_kinks


def laplacian_of(value, x, axes, coefficients=None, chunk_size=None):
    """Returns `value(x)` and its Laplacian along `axes`, non-negative indices, with the given coefficients."""
    return _summed_over(value, x, along_axes(x, axes, coefficients), chunk_size)


def laplacian_estimate_of(value, x, axes, sampling, vectors, coefficients=None, chunk_size=None):
    """Returns `value(x)` and an estimate of its Laplacian, from the random directions `vectors`, one in each row.

    The estimate is a mean, or the pair of a mean and its standard error.
    """
    directions = along_vectors(x, axes, vectors, coefficients, sampling.is_on_axes)
    if not sampling.return_standard_error:
        out, total = _summed_over(value, x, directions, chunk_size)
        return out, total / sampling.samples
    out, samples = _summed_over(value, x, directions, chunk_size, apart=True)
    return out, sampling.estimate(samples, len(axes))


def divergence_of(value, x, axes, chunk_size=None):
    """Returns `value(x)` and its divergence: the sum of the derivatives of output k along axis number k."""
    out, chunks = _first_derivatives(value, x, axes, unit_vectors(x, axes), chunk_size)
    columns = [stacks.row(stack, row)[:, k] for numbers, stack in chunks for row, k in enumerate(numbers)]
    total = sum(columns) if columns else ops.zeros_like(x[:, 0])
    return out, total[:, None]


def divergence_estimate_of(value, x, axes, sampling, vectors, chunk_size=None):
    """Returns `value(x)` and an estimate of its divergence: a mean, or a mean and its standard error."""
    out, chunks = _first_derivatives(value, x, axes, spread(x, axes, vectors), chunk_size)
    samples = []
    for numbers, stack in chunks:
        along = stacks.of_directions(vectors[numbers.start : numbers.stop])
        samples.append(ops.moveaxis(ops.sum(stack * along, axis=-1, keepdims=True), stacks.axis(2), 0))
    if not samples:
        samples = [ops.zeros((sampling.samples, ops.shape(x)[0], 1), dtype=x.dtype)]
    return out, sampling.estimate(ops.concatenate(samples, axis=0), len(axes))


def _summed_over(value, x, directions, chunk_size, apart=False):
    """Returns `value(x)` and the sum of second derivatives. With `apart`, all of them, along axis 0."""
    call, operations = _recorded("laplacian", value, x)
    y = call.target
    _require_output(y)
    parts = _taken_apart(call, operations)
    if parts is None:
        is_known = None not in tuple(y.shape)[1:]
        samples = (_nested_laplacian if is_known else _laplacian_by_directions)(value, x, directions)
        return call.value, samples if apart else ops.sum(samples, axis=0)
    shape = (directions.count, *ops.shape(y)) if apart else ops.shape(y)
    found = []
    for numbers in _chunks(directions.count, chunk_size):
        carried = _at_target(parts, *directions.chunk(numbers.start, numbers.stop).start(apart))
        if carried is not None and carried.summed is not None:
            found.append(carried.summed)
    if not found:
        warn_of_kinks("laplacian", parts[0])
        return call.value, ops.zeros(shape, dtype=y.dtype)
    if not apart:
        return call.value, ops.broadcast_to(sum(found[1:], found[0]), shape)
    samples = ops.concatenate([ops.moveaxis(s, stacks.axis(stacks.rank(s)), 0) for s in found], axis=0)
    return call.value, ops.broadcast_to(samples, shape)


def _first_derivatives(value, x, axes, vectors, chunk_size):
    """Returns `value(x)` and, for each chunk of `vectors`, their numbers and the stack of derivatives along them."""
    call, operations = _recorded("divergence", value, x)
    _require_field(call.target, axes)
    parts = _taken_apart(call, operations)
    chunks = []
    for numbers in _chunks(vectors.shape[0], chunk_size):
        rows = vectors[numbers.start : numbers.stop]
        if parts is None:
            stack = ops.broadcast_to(rows[:, None], (len(numbers), *ops.shape(x)))
            (first,) = backend.pushforward_batch(call.tape, call.flat_targets, call.flat_sources, [stack])
            first = None if first is None else ops.moveaxis(first, 0, stacks.axis(2))
        else:
            found = _at_target(parts, Carried(stacks.of_directions(rows), None, True), Sum(order=1))
            first = None if found is None else collapsed.full(found, call.target).first
        chunks += [] if first is None else [(numbers, first)]
    return call.value, chunks


def _recorded(name, value, x):
    operations = backend.operations()
    return TapedCall(name, value, (x,), operations=operations), operations


def _taken_apart(call, operations):
    return backend.steps_between(call.tape, operations, call.flat_targets, call.flat_sources)


def _chunks(count, chunk_size):
    size = chunk_size or count
    return [range(i, min(i + size, count)) for i in range(0, count, size)]


def _at_target(parts, carried, kind):
    steps, (target,), (source,) = parts
    if target is None or source is None:
        return None
    return collapsed.push(steps, [source], [carried], kind).get(target)


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


def _nested_laplacian(value, x, directions):
    """The gradient of each output element, then its derivatives along all directions at once."""

    def gradients(x):
        call = TapedCall("laplacian", value, (x,))
        shapes.append(call.target.shape)
        return [call.vjp(_unit(call.target, k)) for k in range(math.prod(call.target.shape[1:]))]

    shapes: list = []
    outer = TapedCall("laplacian", gradients, (x,))
    left, right = directions.pairs(x)
    columns = []
    for gradient in outer.target:
        (along,) = backend.pullback_batch(outer.tape, [gradient], outer.flat_sources, [left])
        columns.append(ops.zeros_like(left[:, :, 0]) if along is None else ops.sum(along * right, axis=-1))
    if not columns:
        return ops.zeros((directions.count, ops.shape(x)[0], *shapes[-1][1:]), dtype=x.dtype)
    return ops.reshape(ops.stack(columns, axis=2), (directions.count, -1, *shapes[-1][1:]))


def _laplacian_by_directions(value, x, directions):
    """Second derivatives along one direction at a time, for an output whose size is not known."""
    left, right = directions.pairs(x)
    found = []
    for i in range(directions.count):

        def first(x, direction=left[i]):
            return jvp_named("laplacian", value, (x,), (direction,))[1]

        found.append(jvp_named("laplacian", first, (x,), (right[i],))[1])
    return ops.stack(found, axis=0)
