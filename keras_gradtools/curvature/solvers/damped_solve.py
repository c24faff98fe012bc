"""Solves linear equations with a matrix that may not be positive definite, by damping it until it is."""

from typing import Any, NamedTuple

import numpy as np

from keras_gradtools import validation
from keras_gradtools.annotations import ArrayLike
from keras_gradtools.curvature.operators.solver_vectors import in_kind_of, lower_triangle, real_numbers
from keras_gradtools.curvature.solvers.cholesky import cholesky_solve
from keras_gradtools.display.results import displayed

# The least damping that is tried after the initial one, relative to the largest entry of the matrix.
_SMALLEST_SHARE = 1e-10


@displayed
class DampedSolution(NamedTuple):
    """The solution of a damped equation.

    Attributes:
        x: The solution, with the shape of `b`: a tensor of its dtype, or an array in double precision.
        damping: The number that was added to the diagonal.
        attempts: Number of factorizations.
    """

    x: Any
    damping: float
    attempts: int


def damped_solve(a: ArrayLike, b: ArrayLike, damping: float = 0.0, *, factor: float = 10.0) -> DampedSolution:
    r"""Solves $(A + \lambda I) x = b$ by a Cholesky factorization, with the first $\lambda$ for which it exists.

    The first $\lambda$ is `damping`. As long as the matrix is not positive definite, $\lambda$ is multiplied by
    `factor`, and raised to at least 1e-10 times the largest entry of the matrix. No inverse is formed, and the equation
    is solved in double precision.

    Args:
        a: A symmetric matrix of shape `(n, n)`, an array or a tensor. Only its lower triangle is read.
        b: An array or a tensor of shape `(n,)` or `(n, columns)`.
        damping: The initial $\lambda$, 0 or more.
        factor: The factor by which $\lambda$ grows, above 1.

    Returns:
        A named tuple, `DampedSolution`.

    Raises:
        ValueError: If shapes do not match, an option is invalid, or a number is not finite.

    Cost:
        $n^3 / 3$ multiplications for each $\lambda$, and memory for two matrices.

    Example:

    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> kg.curvature.damped_solve(np.diag([2.0, 4.0]), np.array([2.0, 2.0])).x
    array([1. , 0.5])
    >>> solution = kg.curvature.damped_solve(np.diag([-1.0, 4.0]), np.array([1.0, 1.0]), damping=0.5)
    >>> solution.damping, solution.attempts
    (5.0, 2)

    Source: Nocedal & Wright, "Numerical Optimization" (2006), algorithm 3.3.
    """
    matrix, columns = real_numbers(a), real_numbers(b)
    fits = matrix is not None and columns is not None and matrix.ndim == 2 and columns.ndim in (1, 2)
    if not fits or len(set(matrix.shape)) != 1 or len(columns) != len(matrix):
        raise ValueError(
            "damped_solve expects a matrix of shape (n, n) and `b` of shape (n,) or (n, columns), of real numbers. "
            f"Received: {validation.describe(a)} and {validation.describe(b)}."
        )
    damping = validation.require_number("damped_solve", "damping", damping, least=0)
    factor = validation.require_number("damped_solve", "factor", factor, above=1)
    matrix, columns = lower_triangle(matrix), columns.astype("float64")
    if not np.isfinite(matrix).all() or not np.isfinite(columns).all():
        raise ValueError("damped_solve expects finite numbers. Received: NaN or infinity in the matrix or in `b`.")
    diagonal = np.diag_indices_from(matrix)
    undamped = matrix[diagonal].copy()
    scale = np.abs(matrix).max(initial=0.0) or 1.0
    attempts = 0
    while True:
        attempts += 1
        matrix[diagonal] = undamped + damping
        try:
            x = cholesky_solve(matrix, columns)
        except np.linalg.LinAlgError:
            # The loop ends, because by Gershgorin's theorem no eigenvalue is below -n times the largest entry.
            damping = max(factor * damping, _SMALLEST_SHARE * scale)
            continue
        return DampedSolution(in_kind_of(b, x), damping, attempts)
