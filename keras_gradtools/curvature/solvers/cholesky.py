"""The Cholesky solution of a linear equation with NumPy alone, whose `linalg` has no triangular solver."""

import numpy as np

# Rows that are solved at once, by a general solver, whose effort is then small beside the factorization.
_BLOCK = 32


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
    starts = range(0, len(x), _BLOCK)
    blocks = [(slice(i, i + _BLOCK), lower[i : i + _BLOCK, i : i + _BLOCK]) for i in starts]
    for rows, block in blocks:
        x[rows] = np.linalg.solve(block, x[rows] - lower[rows, : rows.start] @ x[: rows.start])
    for rows, block in reversed(blocks):
        x[rows] = np.linalg.solve(block.T, x[rows])
        x[: rows.start] -= lower[rows, : rows.start].T @ x[rows]
    return x
