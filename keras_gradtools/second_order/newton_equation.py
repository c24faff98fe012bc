r"""Newton's equation $(B + \lambda D) p = -g$ of one batch, in double precision, solved for one damping at a time."""

import numpy as np

from keras_gradtools.curvature.estimators.krylov_basis import dot
from keras_gradtools.curvature.solvers.damped_solve import damped_solve

SCALINGS = ("identity", "diagonal")
# Elements of D, and the least damping after a rejected step, are at least this share of the largest entry of B.
SMALLEST_SHARE = 1e-6


class WeightSpace:
    """The equation with the matrix itself, of shape `(n, n)` for n weights.

    Args:
        matrix: $B$, a NumPy array.
        gradient: $g$, a NumPy array.
        scaling: `"identity"`, or `"diagonal"` for Marquardt's damping, where $D$ is the diagonal of the matrix.

    Attributes:
        is_finite: Whether all entries of the matrix are finite. Otherwise, there is nothing to solve.
        size: The largest entry of the matrix in units of the weights in which $D$ is the identity.
    """

    def __init__(self, matrix, gradient, scaling="identity"):
        self._matrix, self._gradient = np.asarray(matrix), np.asarray(gradient, "float64")
        self.is_finite = bool(np.isfinite(self._matrix).all())
        if self.is_finite:
            largest = float(np.abs(self._matrix).max(initial=0.0))
            self.size, self._units = _units(scaling, np.abs(np.diag(self._matrix)), largest)
            # A matrix of the same size is saved.
            is_scaled = scaling != "identity"
            self._scaled = self._units[:, None] * self._matrix * self._units if is_scaled else self._matrix

    def solve(self, damping, right=None):
        """The solution $p$, and the damping for which the scaled matrix is positive definite, at least `damping`.

        `right` takes the place of the gradient. It is what `right_side` returned.
        """
        solution = damped_solve(self._scaled, -self._units * (self._gradient if right is None else right), damping)
        return self._units * solution.x, solution.damping

    def curved(self, step):
        """The quadratic form $p^T B p$."""
        return dot(step, self._matrix @ step)

    def length(self, step):
        """The norm of a step in the scaled units."""
        return float(np.linalg.norm(step / self._units))

    def right_side(self, outputs, pulled_back):
        r"""The right side $J^\top H u / N$ for a change $u$ of the outputs, from $u$ and from the vector itself."""
        return pulled_back


class ResidualSpace:
    r"""The same equation for $B = A^\top A$ and $g = A^\top b$, where $A$ has fewer rows m than columns n.

    The solution is $p = -D^{-1} A^\top z$ with $(A D^{-1} A^\top + \lambda I) z = b$. Its matrix has shape `(m, m)`.
    For small dampings it tends to the shortest step with $A p = -b$.

    Args:
        root: $A = L^\top J / \sqrt N$, a NumPy array, where $J$ is the Jacobian of the outputs of the $N$ examples.
        residual: $b$, a NumPy array.
        factors: $L / \sqrt N$ for each example, of shape `(N, k, k)` for k outputs, where $L L^\top$ is the Hessian of
            the loss with respect to the outputs.
        scaling: As for `WeightSpace`, and the attributes, too.

    Source: Golub & Van Loan, "Matrix Computations" (2013), section 2.1.4, the Sherman-Morrison-Woodbury formula.
    """

    def __init__(self, root, residual, factors, scaling="identity"):
        self._root, self._residual, self._factors = root, residual, factors
        self.is_finite = bool(np.isfinite(root).all() and np.isfinite(residual).all())
        if self.is_finite:
            diagonal = np.einsum("ij,ij->j", root, root)
            # No entry of a positive semi-definite matrix is larger than all those on the diagonal.
            self.size, self._units = _units(scaling, diagonal, float(diagonal.max(initial=0.0)))
            self._scaled = root * self._units
            self._gram = self._scaled @ self._scaled.T

    def solve(self, damping, right=None):
        """As for `WeightSpace`."""
        solution = damped_solve(self._gram, -self._residual if right is None else -right, damping)
        return self._units * (solution.x @ self._scaled), solution.damping

    def curved(self, step):
        """The quadratic form $p^T B p$."""
        image = self._root @ step
        return dot(image, image)

    def length(self, step):
        """The norm of a step in the scaled units."""
        return float(np.linalg.norm(step / self._units))

    def right_side(self, outputs, pulled_back):
        """As for `WeightSpace`, in the coordinates of $b$."""
        return np.einsum("eij,ei->ej", self._factors, outputs.reshape(len(self._factors), -1)).ravel()


def _units(scaling, diagonal, largest):
    """The size of the scaled matrix, and the units of the weights."""
    if scaling == "identity":
        return largest, np.ones(len(diagonal))
    return 1.0, 1.0 / np.sqrt(np.maximum(diagonal.astype("float64"), SMALLEST_SHARE * (largest or 1.0)))
