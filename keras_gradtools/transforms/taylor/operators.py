"""The Laplacian and the divergence of a function of points, with its value, from one recorded call."""

import math

import numpy as np
from keras import ops

from keras_gradtools import backend, validation
from keras_gradtools.transforms.first_order import jvp_named
from keras_gradtools.transforms.taped_call import TapedCall
from keras_gradtools.transforms.taylor import collapsed, stacks
from keras_gradtools.transforms.taylor.collapsed import Carried, Sum
from keras_gradtools.transforms.taylor.kinks import warn_of_kinks


def laplacian_of(value, x, axes, coefficients=None, chunk_size=None):
    """Returns `value(x)` and its Laplacian along `axes`, non-negative indices, with the given coefficients."""
    call, operations = _recorded("laplacian", value, x)
    _require_output(call.target)
    parts = _taken_apart(call, operations)
    if parts is None:
        is_known = None not in tuple(call.target.shape)[1:]
        nested = _nested_laplacian if is_known else _laplacian_by_axes
        return call.value, nested(value, x, axes, coefficients)
    total = None
    for chunk in _chunks(len(axes), chunk_size):
        carried, kind = _second_order_start(x, axes, coefficients, chunk)
        found = _at_target(parts, carried, kind)
        if found is not None and found.summed is not None:
            total = found.summed if total is None else total + found.summed
    if total is None:
        warn_of_kinks("laplacian", parts[0])
        total = ops.zeros_like(call.target)
    return call.value, ops.broadcast_to(total, ops.shape(call.target))


def divergence_of(value, x, axes, chunk_size=None):
    """Returns `value(x)` and its divergence: the sum of the derivatives of output k along axis number k."""
    call, operations = _recorded("divergence", value, x)
    _require_field(call.target, axes)
    parts = _taken_apart(call, operations)
    columns = []
    for chunk in _chunks(len(axes), chunk_size):
        units = _units(x, [axes[k] for k in chunk])
        if parts is None:
            stack = ops.broadcast_to(units[:, None], (len(chunk), *ops.shape(x)))
            (first,) = backend.pushforward_batch(call.tape, call.flat_targets, call.flat_sources, [stack])
            columns += [] if first is None else [first[row, :, k] for row, k in enumerate(chunk)]
        else:
            found = _at_target(parts, Carried(stacks.of_directions(units), None, True), Sum(order=1))
            first = None if found is None else collapsed.full(found, call.target).first
            columns += [] if first is None else [stacks.row(first, row)[:, k] for row, k in enumerate(chunk)]
    total = sum(columns) if columns else ops.zeros_like(x[:, 0])
    return call.value, total[:, None]


def _recorded(name, value, x):
    operations = backend.operations()
    return TapedCall(name, value, (x,), operations=operations), operations


def _taken_apart(call, operations):
    return backend.steps_between(call.tape, operations, call.flat_targets, call.flat_sources)


def _chunks(count, chunk_size):
    size = chunk_size or count
    return [range(i, min(i + size, count)) for i in range(0, count, size)]


def _units(x, axes):
    """The unit vectors of `axes`, one in each row."""
    return ops.convert_to_tensor(np.eye(x.shape[1], dtype="float32")[list(axes)], dtype=x.dtype)


def _second_order_start(x, axes, coefficients, chunk):
    units = _units(x, [axes[i] for i in chunk])
    if coefficients is None or len(coefficients.shape) == 1:
        weights = None if coefficients is None else coefficients[chunk.start : chunk.stop]
        return Carried(stacks.of_directions(units), None, True), Sum(weights=weights)
    # The derivatives along rows of the matrix, sum_j D_ij e_j, are carried with those along the axes.
    rows = ops.matmul(coefficients[..., chunk.start : chunk.stop, :], _units(x, axes))
    if len(coefficients.shape) == 2:
        return Carried(stacks.of_directions(ops.concatenate([units, rows], axis=0)), None, True), Sum(pairs=True)
    both = ops.concatenate([ops.broadcast_to(units, ops.shape(rows)), rows], axis=1)
    return Carried(ops.moveaxis(both, 1, stacks.axis(2))), Sum(pairs=True)


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


def _nested_laplacian(value, x, axes, coefficients):
    """The gradient of each output element, then all second derivatives of it along the axes at once."""

    def gradients(x):
        call = TapedCall("laplacian", value, (x,))
        shapes.append(call.target.shape)
        return [call.vjp(_unit(call.target, k)) for k in range(math.prod(call.target.shape[1:]))]

    shapes: list = []
    outer = TapedCall("laplacian", gradients, (x,))
    stack = [ops.broadcast_to(_units(x, axes)[:, None], (len(axes), *ops.shape(x)))]
    columns = []
    for gradient in outer.target:
        (along,) = backend.pullback_batch(outer.tape, [gradient], outer.flat_sources, stack)
        columns.append(ops.zeros_like(x[:, 0]) if along is None else _contracted(along, axes, coefficients))
    if not columns:
        return ops.zeros((ops.shape(x)[0], *shapes[-1][1:]), dtype=x.dtype)
    return ops.reshape(ops.stack(columns, axis=1), (-1, *shapes[-1][1:]))


def _laplacian_by_axes(value, x, axes, coefficients):
    """Second derivatives along one axis at a time, for an output whose size is not known."""
    rows = units = _units(x, axes)[:, None]
    if coefficients is not None:
        is_vector = len(coefficients.shape) == 1
        rows = units * coefficients[:, None, None] if is_vector else ops.matmul(coefficients, _units(x, axes))
        rows = ops.transpose(rows, (1, 0, 2)) if len(coefficients.shape) == 3 else ops.reshape(rows, units.shape)
    total = 0.0
    for i in range(len(axes)):
        unit, row = (ops.broadcast_to(v, ops.shape(x)) for v in (units[i], rows[i]))

        def first(x, unit=unit):
            return jvp_named("laplacian", value, (x,), (unit,))[1]

        total = total + jvp_named("laplacian", first, (x,), (row,))[1]
    return total


def _contracted(along, axes, coefficients):
    """The sum of D_ij H_ij for each example, from the rows of its Hessian for the axes."""
    rows = ops.take(along, ops.convert_to_tensor(list(axes), dtype="int32"), axis=2)
    if coefficients is None or len(coefficients.shape) == 1:
        diagonal = ops.stack([rows[k, :, k] for k in range(len(axes))], axis=0)
        return ops.sum(diagonal if coefficients is None else diagonal * coefficients[:, None], axis=0)
    return ops.sum(ops.transpose(rows, (1, 0, 2)) * coefficients, axis=(1, 2))
