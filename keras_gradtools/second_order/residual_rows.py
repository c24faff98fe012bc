"""The rows of the Jacobian of residuals with respect to the weights, where possible point by point."""

import math

from keras import ops

from keras_gradtools import backend, nesting
from keras_gradtools.curvature.operators.linear_maps import filled
from keras_gradtools.transforms.taped_call import TapedCall

_NAME = "NormalEquations"
# Each residual of a point, or each one that belongs to no point, costs a vjp.
MOST_RESIDUALS = 16


def residual_rows(loss, parameters, model, weights, points):
    """The gradients of all scaled residuals, of shape `(residuals, n)`.

    A term whose first axis is as long as that of some arrays in `points` is assumed to have one entry for each of these
    points, which depends on no other point. The caller has to check the result. The residuals of any other term are
    taken one by one. Raises `NotImplementedError` if there are many of them.

    Args:
        loss: A `ResidualLoss`.
        parameters: The `Parameters` of `weights`.
        model: The model.
        weights: A tensor for each variable.
        points: What the function of the residuals gets.
    """
    terms = loss.terms(model, weights, points)
    scales = loss.loss.scales(terms)
    sizes = {leaf.shape[0] for leaf in nesting.flatten(points)}
    found = []
    for name, term in terms.items():
        shape = tuple(term.shape)
        is_by_point = bool(shape) and shape[0] in sizes
        if math.prod(shape[is_by_point:]) > MOST_RESIDUALS:
            raise NotImplementedError("Many residuals for each point, or many that belong to no point.")
        rows = _rows_by_point if is_by_point else _rows_one_by_one
        found.append(scales[name] * rows(loss, parameters, model, weights, points, name, shape))
    return ops.concatenate(found)


def _rows_by_point(loss, parameters, model, weights, points, name, shape):
    leaves = nesting.flatten(points)
    count = shape[0]
    examples = [leaf for leaf in leaves if leaf.shape[0] == count]

    def row(place):
        def residual(weights, example):
            # One point of the sets of this size, and the first point of all others, which the term should not need.
            given = iter(example)
            one = [ops.expand_dims(next(given), 0) if leaf.shape[0] == count else leaf[:1] for leaf in leaves]
            term = loss.terms(model, weights, nesting.pack_as(points, one))[name]
            if tuple(term.shape) != (1, *shape[1:]):
                raise NotImplementedError("The residuals of a single point have another shape.")
            return ops.reshape(term, (-1,))[place], []

        found, _ = backend.per_example_gradients(residual, weights, examples, must_vectorize=True)
        return parameters.joined(found, (count,))

    rows = ops.stack([row(place) for place in range(math.prod(shape[1:]))], axis=1)
    return ops.reshape(rows, (-1, parameters.size))


def _rows_one_by_one(loss, parameters, model, weights, points, name, shape):
    call = TapedCall(_NAME, lambda w: loss.terms(model, w, points)[name], (weights,))
    count = math.prod(shape)
    units = ops.reshape(ops.eye(count, dtype=call.value.dtype), (count, *shape))
    found = backend.pullback_batch(call.tape, call.flat_targets, call.flat_sources, [units])
    return parameters.joined(filled(found, call.flat_sources, count), (count,))
