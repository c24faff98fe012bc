"""The Cholesky solution of a linear equation with NumPy alone, whose `linalg` has no triangular solver."""

import numpy as np


def cholesky_solve(matrix, b):
    r"""Solves $A x = b$ with the factors $A = L L^\top$.

    Args:
        matrix: An array of shape `(n, n)`, of which only the lower triangle is read.
        b: An array of shape `(n,)` or `(n, columns)`.

    Returns:
        The solution, an array in the shape of `b`.

    Raises:
        numpy.linalg.LinAlgError: If the matrix is not positive definite.

    Source: Golub & Van Loan, "Matrix Computations" (2013), algorithms 3.1.1, 3.1.4 and 4.2.1.
    """
    lower = np.linalg.cholesky(matrix)
    x = np.array(b, lower.dtype)
    # Both loops read rows of L, which are contiguous.
    for i in range(len(x)):
        x[i] = (x[i] - lower[i, :i] @ x[:i]) / lower[i, i]
    for i in reversed(range(len(x))):
        x[i] /= lower[i, i]
        x[:i] -= np.multiply.outer(lower[i, :i], x[i])
    return x
