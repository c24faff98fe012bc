"""Conjugate gradients: solves linear equations using only products with the matrix."""

from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_gradtools import validation
from keras_gradtools.annotations import Function, Matrix, Nested
from keras_gradtools.curvature.estimators.krylov_basis import dot, norm
from keras_gradtools.curvature.operators.matrix_arguments import matvec_of, real_matrix, require_symmetric
from keras_gradtools.curvature.operators.solver_vectors import in_kind_of, real_numbers
from keras_gradtools.display.results import displayed

# The window of Martens' rule: at least this many iterations, and at least all iterations over this number.
LEAST_WINDOW, WINDOW_PARTS = 10, 10
# A curvature below this times the machine epsilon, times the norms of the direction and its product, counts as zero.
ROUNDING = 1e-2


@displayed
class ConjugateGradientsResult(NamedTuple):
    """The result of conjugate gradients.

    Attributes:
        x: The solution, or the last iterate if it has not converged, with the shape and type of `b`.
        reason: Why it stopped: `"converged"`, `"progress"` (progress was too slow), `"negative_curvature"`,
            `"max_iterations"` or `"not_finite"`.
        iterations: Number of iterations, each with one product.
        residual_norm: The norm of `b - (A + damping I) x`, as updated in the iteration.
        negative_curvature: A direction `d` with `d'(A + damping I) d <= 0`, up to rounding, if `reason` is
            `"negative_curvature"`, else None.
        curvature: `d'(A + damping I) d / d'd` for that direction, else None.
    """

    x: Any
    reason: str
    iterations: int
    residual_norm: float
    negative_curvature: Any
    curvature: float | None


def conjugate_gradients(
    a: Matrix,
    b: Nested,
    x0: Nested = None,
    *,
    damping: float = 0.0,
    preconditioner: Any = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    progress_tol: float | None = None,
    max_iterations: int | None = None,
    callback: Function | None = None,
) -> ConjugateGradientsResult:
    r"""Solves $(A + \lambda I) x = b$ for a symmetric positive definite matrix, using only products with it.

    It minimizes $q(x) = \tfrac12 x^\top (A + \lambda I) x - b^\top x$ over growing Krylov spaces, and stops when

    - the residual $\lVert b - (A + \lambda I) x \rVert$ is at most `max(rtol * norm(b), atol)`.
    - the last $k = \max(10, 0.1 i)$ of $i$ iterations have contributed less than `k * progress_tol` of the total
      decrease of $q$. This is Martens' rule, which stops long before the residual is small.
    - it meets a direction of zero or negative curvature, so the matrix is not positive definite. The result then holds
      this direction and the last $x$ before it, which is not a solution.
    - a number is not finite.

    Vectors have the precision of `b`, and all scalars are in double precision.

    Args:
        a: The matrix: a curvature operator, an expression of operators such as `2 * h + g`, an array or a tensor, a
            sparse matrix or a `LinearOperator` of SciPy, or any object with `a @ v`.
        b: A vector of shape `(n,)`, an array or a tensor.
        x0: The starting point. Default: zeros.
        damping: $\lambda$, 0 or more.
        preconditioner: A function of a NumPy vector $v$ that returns an approximation of $(A + \lambda I)^{-1} v$ and
            is symmetric and positive definite, or an array, the diagonal of a diagonal preconditioner. None for no
            preconditioner.
        rtol: Relative tolerance for the residual, see above.
        atol: Absolute tolerance for the residual, see above.
        progress_tol: Tolerance of Martens' rule, see above. Martens uses 5e-4. None disables this rule.
        max_iterations: Maximum number of iterations. Default: `n`.
        callback: A function that is called as `callback(i, x, q)` after each iteration, with the number of the
            iteration, a NumPy vector that is not changed afterwards, and $q(x)$.

    Returns:
        A named tuple, `ConjugateGradientsResult`.

    Raises:
        ValueError: If a vector, the matrix, the preconditioner or an option is invalid.

    Cost:
        One product for each iteration, one more with `x0`, and memory for five vectors.

    Example:

    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> result = kg.curvature.conjugate_gradients(np.diag([1.0, 4.0]), np.array([1.0, 2.0]))
    >>> result.x.round(6), result.reason, result.iterations
    (array([1. , 0.5]), 'converged', 2)

    Source: Hestenes & Stiefel, "Methods of conjugate gradients for solving linear systems" (1952); Martens, "Deep
    learning via Hessian-free optimization" (2010), section 4.4, for the rule with `progress_tol`.
    """
    a = real_matrix("conjugate_gradients", a)
    if callback is not None and (not callable(callback) or isinstance(callback, keras.KerasTensor)):
        raise validation.refused("conjugate_gradients", "a function of (i, x, value)", "callback", callback)
    b_given, b = b, _vector("b", b)
    n = len(b)
    shape = tuple(getattr(a, "shape", (n, n)))
    if shape != (n, n):
        raise ValueError(f"conjugate_gradients expects a square matrix for b of shape ({n},). Received: shape {shape}.")
    require_symmetric("conjugate_gradients", a)
    for name, value in (("damping", damping), ("rtol", rtol), ("atol", atol)):
        validation.require_number("conjugate_gradients", name, value, least=0)
    validation.require_number("conjugate_gradients", "progress_tol", progress_tol, least=0, may_be_none=True)
    validation.require_count("conjugate_gradients", "max_iterations", max_iterations, 0, may_be_none=True)
    precondition = _preconditioner(preconditioner, n)
    matvec = matvec_of(a)

    def product(v):
        found = np.array(matvec(v), dtype=b.dtype)
        if damping:
            found += b.dtype.type(damping) * v
        return found

    def in_kind(v):
        return in_kind_of(b_given, v)

    def result(reason, direction=None, curvature=None):
        direction = None if direction is None else in_kind(direction)
        return ConjugateGradientsResult(in_kind(x), reason, i, float(length), direction, curvature)

    limit = n if max_iterations is None else max_iterations
    i, x = 0, np.zeros_like(b) if x0 is None else _vector("x0", x0, n).astype(b.dtype)
    residual = b.copy() if x0 is None else b - product(x)
    length = norm(residual)
    threshold = max(rtol * norm(b), atol)
    direction = preconditioned = precondition(residual)
    slope = dot(residual, preconditioned)
    values = [-0.5 * (dot(b, x) + dot(residual, x))]
    while True:
        if not np.isfinite(length) or not np.isfinite(slope):
            return result("not_finite")
        if length <= threshold:
            return result("converged")
        if i == limit:
            return result("max_iterations")
        curved = product(direction)
        curvature = dot(direction, curved)
        if not np.isfinite(curvature):
            return result("not_finite")
        i += 1
        size = dot(direction, direction)
        if slope <= 0:
            raise not_positive_definite(slope)
        # A curvature that is zero within rounding error counts as zero.
        if curvature <= ROUNDING * float(np.finfo(b.dtype).eps) * norm(direction) * norm(curved):
            return result("negative_curvature", direction, curvature / size)
        step = slope / curvature
        x = x + b.dtype.type(step) * direction
        residual = residual - b.dtype.type(step) * curved
        length = norm(residual)
        values.append(-0.5 * (dot(b, x) + dot(residual, x)))
        if callback is not None:
            callback(i, x, values[-1])
        if progress_tol and _is_slow(values, progress_tol):
            return result("progress")
        preconditioned = precondition(residual)
        slope, before = dot(residual, preconditioned), slope
        direction = preconditioned + b.dtype.type(slope / before) * direction


def _is_slow(values, tol):
    i = len(values) - 1
    k = max(LEAST_WINDOW, i // WINDOW_PARTS)
    return i > k and values[-1] < 0 and (values[-1] - values[-1 - k]) / values[-1] < k * tol


def not_positive_definite(slope):
    """The error for a preconditioner P with a residual r for which `slope`, r'P r, is not positive."""
    return ValueError(
        "conjugate_gradients expects a positive definite `preconditioner`. Received: one with a product "
        f"r'P r = {slope:.3g} for the residual r."
    )


def _preconditioner(given, n):
    if given is None:
        return lambda v: v
    if callable(given) and not isinstance(given, keras.KerasTensor):
        return lambda v: np.asarray(ops.convert_to_numpy(given(v)), dtype=v.dtype)
    diagonal = validation.as_array(
        given, "conjugate_gradients expects as `preconditioner` a function, or positive numbers"
    )
    if diagonal.shape != (n,) or not np.all(diagonal > 0):
        raise ValueError(
            f"conjugate_gradients expects as `preconditioner` a function, or {n} positive numbers. Received: "
            f"{validation.describe(given)}."
        )
    return lambda v: (diagonal * v).astype(v.dtype)


def _vector(role, given, n=None):
    array = real_numbers(given)
    is_right = array is not None and array.ndim == 1 and (n is None or len(array) == n)
    if not is_right or not len(array):
        expected = "(n,)" if n is None else f"({n},)"
        raise ValueError(
            f"conjugate_gradients expects real numbers of shape {expected} as `{role}`. Received: "
            f"{validation.describe(given)}."
        )
    return array
