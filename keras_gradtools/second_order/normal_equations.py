"""The Gauss-Newton matrix and the gradient of a small model, from the Jacobians of its examples."""

import math

import numpy as np
from keras import ops

from keras_gradtools import backend, nesting
from keras_gradtools.curvature.data.batch_loss import with_masks_of
from keras_gradtools.curvature.data.batches import batch_size_of
from keras_gradtools.curvature.operators.gauss_newton import GaussNewton
from keras_gradtools.curvature.operators.linear_maps import SecondDerivative
from keras_gradtools.transforms.first_order import value_and_grad

# Above these limits, products with unit vectors are used. Each output of an example costs a vjp of the whole batch, the
# Jacobian is held in memory, and its product takes this many multiplications, a second or two in double precision.
_MOST_OUTPUTS = 16
_MOST_NUMBERS = 2**24
_MOST_MULTIPLICATIONS = 2**32
# The matrix is used only if its product differs by at most this, relative, from that of the operator, which assumes
# less about the model.
_TOLERANCE = 1e-3


class NormalEquations:
    r"""The loss, the gradient and the matrix of an operator, for steps that factorize the matrix.

    For a `GaussNewton` operator they are $G = \sum_i J_i^\top H_i J_i$ and $g = \sum_i J_i^\top r_i$, where $J_i$ is
    the Jacobian of the outputs for one example with respect to the weights, and $r_i$ and $H_i$ are the gradient and
    the Hessian of the loss with respect to these outputs. The sums are in double precision, since the condition number
    of $G$ is the square of that of the Jacobian.

    This needs examples that do not depend on one another, a backend that can compute the Jacobians of all examples at
    once, and Jacobians that are not too large. Otherwise, and for other operators, `dense()` is used.

    Args:
        operator: A curvature operator. `of` takes it, or an operator that its `of_batch` returned.
    """

    def __init__(self, operator):
        self._operator = operator
        # If the model returns probabilities, the operator uses a loss of their logits, which is not handled here.
        self._is_possible = isinstance(operator, GaussNewton) and not operator.is_of_logits
        self._is_checked = False

    def of(self, operator):
        """The loss, the gradient and the matrix at the current weights."""
        operator.check()
        found = self._summed(operator) if self._is_possible else None
        if found is None:
            return (*operator.loss_and_gradient(), operator.dense())
        return found

    def _summed(self, operator):
        sums, count = None, 0
        for batch in operator.batches():
            if not self._fits(batch):
                return None
            try:
                of_batch = _sums(operator, batch)
                if not self._is_checked:
                    self._is_possible = _agrees(operator.of_batch(batch, draws_anew=False), batch, of_batch)
                    self._is_checked = True
            except Exception:
                # If the model itself is at fault, products with unit vectors will raise its error again.
                self._is_possible = False
            if not self._is_possible:
                return None
            sums = of_batch if sums is None else [a + b for a, b in zip(sums, of_batch, strict=True)]
            count += batch_size_of(batch)
        return _means(sums, count)

    def _fits(self, batch):
        # Counts one output for each example, since the number of outputs is only known after a call.
        n, p = batch_size_of(batch), self._operator.shape[0]
        return n * p <= _MOST_NUMBERS and n * p * p <= _MOST_MULTIPLICATIONS


def _sums(operator, batch):
    total, gradient, matrix = np.zeros(()), 0.0, 0.0
    for part in operator.compute("normal equations", _of_batch, batch):
        jacobian, curved, residual, loss = (ops.convert_to_numpy(x).astype("float64", copy=False) for x in part)
        matrix = matrix + jacobian.T @ curved
        gradient = gradient + residual @ jacobian
        total = total + loss
    return [total, gradient, matrix]


def _agrees(operator, batch, sums):
    _, _, matrix = _means(sums, batch_size_of(batch))
    v = np.random.default_rng(0).choice([-1.0, 1.0], len(matrix))
    expected = np.asarray(operator @ v.astype(operator.dtype), "float64")
    # Written so that NaN counts as a mismatch.
    return bool(np.linalg.norm(matrix @ v - expected) <= _TOLERANCE * np.linalg.norm(expected))


def _means(sums, count):
    sums, count = backend.summed_over_processes(sums, count)
    total, gradient, matrix = (ops.convert_to_numpy(x) / count for x in sums)
    return float(total), gradient, 0.5 * (matrix + matrix.T)


def _of_batch(spec, loss, parameters, model, batch):
    """For each replica's part: the Jacobian J, H J with the Hessian H of the loss, the gradient of the loss, the loss.

    H and the gradient are with respect to the outputs. J has a row for each output of each example. Everything except J
    is multiplied by the number of examples in the part.
    """

    def of_part(part):
        x, y, sample_weight = part
        size = batch_size_of(part)
        weights = parameters.variables_as_tensors()
        outputs = loss.outputs(model, weights, x)
        if nesting.is_nested(outputs) or outputs.shape[0] != size or loss.regularization(model, weights) is not None:
            raise NotImplementedError("The model has several outputs, outputs without a batch axis, or regularizers.")
        shape = tuple(outputs.shape)
        count = math.prod(shape[1:])
        if count > _MOST_OUTPUTS:
            raise NotImplementedError("The model has many outputs.")

        def loss_of(outputs_):
            return loss.of_outputs(with_masks_of(outputs_, outputs), y, sample_weight)

        given = ops.stop_gradient(outputs)
        value, gradient = value_and_grad(loss_of)(given)
        units = ops.eye(count, dtype=given.dtype)
        stack = ops.broadcast_to(ops.reshape(units, (count, 1, *shape[1:])), (count, *shape))
        # Examples do not depend on one another, so one direction for all of them gives a column of every H_i.
        hessian = SecondDerivative("NormalEquations", loss_of, given).apply_stack([stack])[0]
        jacobian = ops.stack(
            [_rows_of_output(loss, parameters, model, weights, x, place) for place in range(count)], axis=1
        )
        hessian = ops.reshape(ops.moveaxis(hessian, 0, 1), (size, count, count))
        curved = size * ops.matmul(hessian, jacobian)
        n = parameters.size
        return [
            ops.reshape(jacobian, (size * count, n)),
            ops.reshape(curved, (size * count, n)),
            size * ops.reshape(gradient, (-1,)),
            size * value,
        ]

    parts = backend.replica_results(of_part, batch, parameters.variables[0])
    return [[ops.stop_gradient(x) for x in part] for part in parts], None


def _rows_of_output(loss, parameters, model, weights, x, place):
    """The gradient of one output for each example, of shape `(batch, n)`."""

    def output(weights, examples):
        example = nesting.pack_as(x, [ops.expand_dims(e, 0) for e in examples])
        return ops.reshape(loss.outputs(model, weights, example), (-1,))[place], []

    found, _ = backend.per_example_gradients(output, weights, nesting.flatten(x), must_vectorize=True)
    return ops.concatenate([ops.reshape(g, (g.shape[0], -1)) for g in found], axis=1)
