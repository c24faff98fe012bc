"""The loss, the gradient and Newton's equation of a batch, where possible from the Jacobians of its examples."""

import math

import numpy as np
from keras import ops

from keras_gradtools import backend
from keras_gradtools.curvature.data.batches import batch_size_of
from keras_gradtools.curvature.operators import dense_memory
from keras_gradtools.curvature.operators.gauss_newton import GaussNewton
from keras_gradtools.second_order.example_jacobians import ExampleJacobians, example_jacobians
from keras_gradtools.second_order.newton_equation import ResidualSpace, WeightSpace

# Above these limits, products with unit vectors are used. The Jacobian is held in memory, and its product takes this
# many multiplications, a second or two in double precision.
_MOST_NUMBERS = 2**25
_MOST_MULTIPLICATIONS = 2**34
# For more weights than these, n products and a factorization of the matrix take longer than conjugate gradients.
_MOST_WEIGHTS = 4096
# The matrix is used only if its product differs by at most this, relative, from that of the operator, which assumes
# less about the model. A float64 model that is rounded to single precision, see `kg.double_precision`, may fail this.
_TOLERANCE, _TOLERANCE_IN_DOUBLES = 1e-3, 1e-8
# Eigenvalues of the Hessian of the loss below this share of the largest are rounding, and a gradient of the loss that
# needs them is one that the Gauss-Newton matrix does not see.
_RANK_TOLERANCE = 1e-6


class NormalEquations:
    r"""The loss, the gradient and Newton's equation of an operator, for steps that factorize a matrix.

    For a `GaussNewton` operator they are $G = \sum_i J_i^\top H_i J_i$ and $g = \sum_i J_i^\top r_i$, where $J_i$ is
    the Jacobian of the outputs for one example with respect to the weights, and $r_i$ and $H_i$ are the gradient and
    the Hessian of the loss with respect to these outputs. The sums are in double precision, since the condition number
    of $G$ is the square of that of the Jacobian. If there are fewer outputs than weights, the equation is solved in the
    space of the outputs, which gives the same step from a smaller matrix.

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
        # A sum over processes adds matrices, and would need all rows of all processes.
        self._is_alone = backend.summed_over_processes([np.zeros(())], 1)[1] == 1

    def fits(self, examples):
        """Whether the Jacobians of so many examples can be used, as far as is known without computing them."""
        # None for the outputs if there are regularizers.
        outputs, n = self._operator.outputs_of_example(), self._operator.shape[0]
        if not self._is_possible or outputs is None:
            return False
        rows = examples * outputs
        return rows * n <= _MOST_NUMBERS and rows * n * min(rows, n) <= _MOST_MULTIPLICATIONS

    def are_affordable(self, examples):
        """Whether an equation for so many examples should be formed, or be solved by products alone."""
        return self._operator.shape[0] <= _MOST_WEIGHTS or self.fits(examples)

    def of(self, operator, scaling="identity"):
        """The loss, the gradient and the equation at the current weights."""
        operator.check()
        found = self._summed(operator, scaling) if self._is_possible else None
        if found is None:
            loss, gradient = operator.loss_and_gradient()
            return loss, gradient, WeightSpace(operator.dense(), gradient, scaling)
        return found

    def _summed(self, operator, scaling):
        sums = _Sums(self._operator.shape[0], self._is_alone)
        for batch in operator.batches():
            found = self._jacobians(operator, batch) if self.fits(batch_size_of(batch)) else None
            if found is None:
                return None
            sums.add(found, batch_size_of(batch))
        return sums.equation(scaling)

    def _jacobians(self, operator, batch):
        try:
            found = example_jacobians(operator, batch)
            if not self._is_checked:
                self._is_possible = _agrees(operator.of_batch(batch, draws_anew=False), batch, found)
                self._is_checked = True
        except Exception:
            # If the model itself is at fault, products with unit vectors will raise its error again.
            self._is_possible = False
        return found if self._is_possible else None


class _Sums:
    """Sums over the examples. As long as there are fewer outputs than weights, the Jacobians are held instead."""

    def __init__(self, n, may_hold):
        self._n, self._may_hold = n, may_hold
        self._loss, self._gradient, self._matrix, self._count = np.zeros(()), 0.0, None, 0
        self._held: list[ExampleJacobians] = []
        self._rows = 0

    def add(self, found, examples):
        self._loss, self._gradient = self._loss + found.loss, self._gradient + found.gradient()
        self._count, self._rows = self._count + examples, self._rows + found.residuals.size
        self._held.append(found)
        if not (self._may_hold and self._rows < self._n and self._rows * self._n <= _MOST_NUMBERS):
            self._add_matrices()

    def _add_matrices(self):
        for found in self._held:
            if self._matrix is None:
                dense_memory.require_room("GaussNewton", self._n, np.dtype("float64"))
                self._matrix = np.zeros((self._n, self._n))
            self._matrix += found.gauss_newton()
        self._held = []

    def equation(self, scaling):
        """The mean loss, the mean gradient and the equation."""
        if self._held:
            found = _in_residual_space(self._held, self._count, scaling)
            if found is not None:
                return float(self._loss) / self._count, self._gradient / self._count, found
            self._add_matrices()
        sums, count = backend.summed_over_processes([self._loss, self._gradient, self._matrix], self._count)
        loss, gradient, matrix = (np.asarray(ops.convert_to_numpy(x)) / count for x in sums)
        return float(loss), gradient, WeightSpace(matrix, gradient, scaling)


def _in_residual_space(held, count, scaling):
    """The `ResidualSpace` equation. None if the Hessian of the loss has no root, or misses a part of the gradient."""
    jacobians = np.concatenate([found.jacobians for found in held])
    hessians = np.concatenate([found.hessians for found in held])
    residuals = np.concatenate([found.residuals for found in held])
    values, vectors = np.linalg.eigh(0.5 * (hessians + np.swapaxes(hessians, 1, 2)))
    largest = np.abs(values).max(axis=1, keepdims=True)
    if not np.isfinite(largest).all() or (values < -_RANK_TOLERANCE * largest).any():
        return None
    is_kept = values > _RANK_TOLERANCE * largest
    roots = np.sqrt(np.where(is_kept, values, 0.0))
    along = np.einsum("eij,ei->ej", vectors, residuals)
    lost = np.linalg.norm(np.where(is_kept, 0.0, along))
    if lost > _RANK_TOLERANCE * np.linalg.norm(residuals):
        return None
    factors = vectors * roots[:, None, :] / math.sqrt(count)
    root = np.swapaxes(factors, 1, 2) @ jacobians
    residual = np.divide(along, roots, out=np.zeros_like(along), where=is_kept) / math.sqrt(count)
    return ResidualSpace(root.reshape(-1, root.shape[-1]), residual.ravel(), factors, scaling)


def _agrees(operator, batch, found):
    """Whether the product with one vector is that of the operator, on all processes together."""
    v = np.random.default_rng(0).choice([-1.0, 1.0], operator.shape[0])
    (product,), count = backend.summed_over_processes([found.product(v)], batch_size_of(batch))
    expected = np.asarray(operator @ v.astype(operator.dtype), "float64")
    error = np.linalg.norm(np.asarray(ops.convert_to_numpy(product)) / count - expected)
    tolerance = _TOLERANCE_IN_DOUBLES if operator.dtype == "float64" else _TOLERANCE
    # Written so that NaN counts as a mismatch.
    return bool(error <= tolerance * np.linalg.norm(expected))
