"""The Jacobian of the outputs of each example of a batch, and the derivatives of the loss with respect to outputs."""

import math
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_gradtools import backend, nesting
from keras_gradtools.curvature.data.batch_loss import with_masks_of
from keras_gradtools.curvature.data.batches import batch_size_of
from keras_gradtools.curvature.data.residual_loss import ResidualLoss
from keras_gradtools.curvature.operators.linear_maps import SecondDerivative
from keras_gradtools.second_order.residual_rows import residual_rows
from keras_gradtools.transforms.first_order import value_and_grad

# Each output of an example costs a vjp of the whole batch.
MOST_OUTPUTS = 16


class ExampleJacobians(NamedTuple):
    """Sums over the examples, in double precision. All but the Jacobians are multiplied by the weights of the examples.

    Attributes:
        jacobians: Of shape `(examples, k, n)` for k outputs and n weights.
        hessians: Of the loss with respect to the outputs, of shape `(examples, k, k)`.
        residuals: The gradients of the loss with respect to the outputs, of shape `(examples, k)`.
        loss: The sum of the losses.
    """

    jacobians: np.ndarray
    hessians: np.ndarray
    residuals: np.ndarray
    loss: float

    def gradient(self):
        """The sum of the gradients of the examples."""
        return np.einsum("ek,ekn->n", self.residuals, self.jacobians)

    def product(self, vector):
        """The product of the sum of the Gauss-Newton matrices with a vector."""
        images = self.hessians @ (self.jacobians @ vector)[:, :, None]
        return np.einsum("ek,ekn->n", images[:, :, 0], self.jacobians)

    def gauss_newton(self):
        """The sum of the Gauss-Newton matrices of the examples."""
        n = self.jacobians.shape[-1]
        rows = self.jacobians.reshape(-1, n)
        diagonals = np.einsum("eii->ei", self.hessians)
        is_diagonal = np.count_nonzero(self.hessians) == np.count_nonzero(diagonals)
        if not is_diagonal or diagonals.min(initial=0.0) < 0.0:
            matrix = rows.T @ (self.hessians @ self.jacobians).reshape(-1, n)
            return 0.5 * (matrix + matrix.T)
        # As for the mean squared error. NumPy computes only half of a product with the transpose of the same array.
        first = diagonals.flat[0] if diagonals.size else 1.0
        if (diagonals == first).all():
            return first * (rows.T @ rows)
        rows = np.sqrt(diagonals).reshape(-1, 1) * rows
        return rows.T @ rows


def example_jacobians(operator, batch):
    """The `ExampleJacobians` of a batch, on all replicas of this process.

    Raises `NotImplementedError` if the model has several outputs, many of them, or regularizers. Assumes that the
    examples do not depend on one another.
    """
    parts = operator.compute("example jacobians", _of_batch, batch)
    jacobians, hessians, residuals, losses = ([_doubles(part[i]) for part in parts] for i in range(4))
    joined = [a[0] if len(a) == 1 else np.concatenate(a) for a in (jacobians, hessians, residuals)]
    return ExampleJacobians(joined[0], joined[1], joined[2], float(sum(losses)))


def _doubles(x):
    return ops.convert_to_numpy(x).astype("float64", copy=False)


def _of_batch(spec, loss, parameters, model, batch):
    of_part = _of_residuals if isinstance(loss, ResidualLoss) else _of_outputs
    parts = backend.replica_results(lambda part: of_part(loss, parameters, model, part), batch, parameters.variables[0])
    return [[ops.stop_gradient(x) for x in part] for part in parts], None


def _of_outputs(loss, parameters, model, part):
    x, y, sample_weight = part
    size = batch_size_of(part)
    weights = parameters.variables_as_tensors()
    outputs = loss.outputs(model, weights, x)
    if nesting.is_nested(outputs) or outputs.shape[0] != size or loss.regularization(model, weights) is not None:
        raise NotImplementedError("The model has several outputs, outputs without a batch axis, or regularizers.")
    shape = tuple(outputs.shape)
    count = math.prod(shape[1:])
    if count > MOST_OUTPUTS:
        raise NotImplementedError("The model has many outputs.")

    def loss_of(outputs_):
        return loss.of_outputs(with_masks_of(outputs_, outputs), y, sample_weight)

    given = ops.stop_gradient(outputs)
    value, gradient = value_and_grad(loss_of)(given)
    units = ops.eye(count, dtype=given.dtype)
    stack = ops.broadcast_to(ops.reshape(units, (count, 1, *shape[1:])), (count, *shape))
    # Examples do not depend on one another, so one direction for all of them gives a column of every Hessian.
    hessian = SecondDerivative("NormalEquations", loss_of, given).apply_stack([stack])[0]
    hessian = ops.moveaxis(ops.reshape(hessian, (count, size, count)), 0, 1)
    rows = [_rows_of_output(loss, parameters, model, weights, x, place) for place in range(count)]
    return [ops.stack(rows, axis=1), size * hessian, size * ops.reshape(gradient, (size, count)), size * value]


def _rows_of_output(loss, parameters, model, weights, x, place):
    """The gradient of one output for each example, of shape `(batch, n)`."""

    def output(weights, examples):
        example = nesting.pack_as(x, [ops.expand_dims(e, 0) for e in examples])
        return ops.reshape(loss.outputs(model, weights, example), (-1,))[place], []

    found, _ = backend.per_example_gradients(output, weights, nesting.flatten(x), must_vectorize=True)
    return ops.concatenate([ops.reshape(g, (g.shape[0], -1)) for g in found], axis=1)


def _of_residuals(loss, parameters, model, part):
    """As `_of_outputs`, where each scaled residual counts as an example, and H is 2."""
    points, _, _ = part
    size, weights = batch_size_of(part), parameters.variables_as_tensors()
    if loss.regularization(model, weights) is not None:
        raise NotImplementedError("The model has regularizers.")
    residuals = loss.outputs(model, weights, points)
    rows = residual_rows(loss, parameters, model, weights, points)
    count = residuals.shape[0]
    hessian = ops.full((count, 1, 1), 2.0 * size, dtype=residuals.dtype)
    gradient = ops.reshape(2.0 * size * residuals, (count, 1))
    return [ops.expand_dims(rows, 1), hessian, gradient, size * ops.sum(ops.square(residuals))]
