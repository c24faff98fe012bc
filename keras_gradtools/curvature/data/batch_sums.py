"""The functions that compiled programs run on one batch: a product, rows, a loss or a gradient, added to totals.

Each `add_...` function multiplies its result for a batch by the number of examples, and adds it to `totals` unless
these are None. If replicas share the batch, `of_part` computes the result for one part of it, times the number of
examples in this part. These results add up to that of the batch.
"""

import functools
import math

from keras import ops

from keras_gradtools import backend
from keras_gradtools.curvature.data.batches import batch_size_of
from keras_gradtools.curvature.operators.solver_vectors import solver_dtype
from keras_gradtools.transforms.first_order import value_and_grad


def drawing(add, spec, loss, parameters, draws, model, values, *args):
    """Runs `add` with random numbers that start from `values`, the states in `draws`."""
    draws = draws.with_values(values)
    return add(spec.drawing(draws), loss.drawing(draws), parameters, model, *args)


def add_product(spec, loss, parameters, model, totals, vectors, batch, seed):
    """Adds the product with a vector, or with a stack of vectors, given as a tensor for each variable."""

    def of_part(part, size):
        linear = spec.of_batch(model, parameters.variables_as_tensors(), part, seed)
        is_stack = len(vectors[0].shape) > len(parameters.shapes[0])
        return (linear.apply_stack if is_stack else linear.apply)([size * v for v in vectors])

    return _added(totals, of_part, batch, parameters)


def flat_product(spec, loss, parameters, model, vector, batch, seed):
    """The product with a flat vector, as a flat vector."""
    products, note = add_product(spec, loss, parameters, model, None, parameters.split(vector), batch, seed)
    return parameters.joined(products), note


def with_product(body, spec, loss, parameters, model, args, batch, seed):
    """Runs `body(product, loss_at, loss_and_gradient, *args)`, as `with_loss`.

    `product` multiplies a flat vector by the matrix of a batch.
    """
    linear = spec.of_batch(model, parameters.variables_as_tensors(), batch, seed)

    def multiplied(vector):
        return ops.stop_gradient(parameters.joined(linear.apply(parameters.split(vector))))

    like = ops.zeros(parameters.size, dtype=solver_dtype(parameters.dtype).name)
    product = backend.hoisted(lambda v: ops.cast(multiplied(v), v.dtype), like)
    return with_loss(functools.partial(body, product), spec, loss, parameters, model, args, batch, seed)


def with_loss(body, spec, loss, parameters, model, args, batch, seed):
    """Runs `body(loss_at, loss_and_gradient, *args)`, functions of a flat offset to the weights, and of nothing."""
    size = batch_size_of(batch)

    # Both divide the same sum, so that equal losses are equal to the last bit.
    def loss_at(offset):
        (total,), _ = add_loss(spec, loss, parameters, model, None, offset, batch, seed)
        return total / size

    def loss_and_gradient():
        (total, gradient), _ = add_loss_and_gradient(spec, loss, parameters, model, None, None, batch, seed)
        return total / size, gradient / size

    return body(loss_at, loss_and_gradient, *args), None


def add_rows(place, count, chunk_size, spec, loss, parameters, model, totals, start, batch, seed):
    """Adds `count` rows from the element `start` of a variable on, for the columns of this and the later variables."""
    shape, dtype = parameters.shapes[place], parameters.variables[place].dtype
    every = ops.arange(math.prod(shape), dtype="int32")

    def of_part(part, size):
        linear = spec.of_batch(model, parameters.variables_as_tensors(), part, seed)

        def rows(numbers):
            units = size * ops.cast(ops.equal((start + numbers)[:, None], every[None, :]), dtype)
            return linear.rows(place, ops.reshape(units, (-1, *shape)))

        if count <= chunk_size:
            return rows(ops.arange(count, dtype="int32"))
        return backend.map_chunks(rows, count, chunk_size)

    return _added(totals, of_part, batch, parameters)


def add_loss(spec, loss, parameters, model, totals, offset, batch, seed):
    """Adds the loss at the weights plus `offset`, a flat vector or None."""

    def of_part(part, size):
        return [size * loss.total(model, parameters.moved(offset), *part)]

    return _added(totals, of_part, batch, parameters)


def add_loss_and_gradient(spec, loss, parameters, model, totals, offset, batch, seed):
    """Adds the loss and its gradient, a flat vector, at the weights plus `offset`."""

    def of_part(part, size):
        value, gradient = value_and_grad(lambda w: loss.total(model, w, *part))(parameters.moved(offset))
        return [size * value, parameters.joined([size * g for g in gradient])]

    return _added(totals, of_part, batch, parameters)


def _added(totals, of_part, batch, parameters):
    of_batch = backend.summed_over_replicas(
        lambda part: of_part(part, batch_size_of(part)), batch, parameters.variables[0]
    )
    # On torch, the results may still have a graph, from trainable weights that are not among the variables.
    summands = [ops.stop_gradient(ops.cast(b, parameters.dtype)) for b in of_batch]
    return summands if totals is None else [t + s for t, s in zip(totals, summands, strict=True)], None
