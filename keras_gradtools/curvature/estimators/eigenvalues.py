"""Some eigenvalues of a symmetric matrix that is known by its products."""

from typing import Literal

import numpy as np

from keras_gradtools import validation
from keras_gradtools.annotations import Matrix
from keras_gradtools.curvature.estimators.krylov_basis import KrylovBasis, require_finite_length
from keras_gradtools.curvature.operators.matrix_arguments import matvec_of, precision_of, progress_of, symmetric_matrix

WHICH = ("LA", "SA", "LM", "BE")
MAX_RESTARTS = 100
# Share of the free room in the basis that a restart fills with Ritz vectors beyond the wanted ones.
_EXTRA_SHARE = 0.5
_ROUNDING = 10.0


class EigenvalueConvergenceError(RuntimeError):
    """Not all eigenvalues converged.

    Attributes:
        eigenvalues: The approximate eigenvalues in ascending order, of shape `(k,)`.
        eigenvectors: The approximate eigenvectors, in columns.
        residuals: The norm of `A v - lambda v` for each of them.
    """

    def __init__(self, message: str, eigenvalues: np.ndarray, eigenvectors: np.ndarray, residuals: np.ndarray) -> None:
        super().__init__(message)
        self.eigenvalues: np.ndarray = eigenvalues
        self.eigenvectors: np.ndarray = eigenvectors
        self.residuals: np.ndarray = residuals


def eigsh(
    a: Matrix,
    k: int = 6,
    which: Literal["LA", "SA", "LM", "BE"] = "LA",
    *,
    ncv: int | None = None,
    max_restarts: int | None = None,
    tol: float | None = None,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    r"""Some eigenvalues and their eigenvectors, as `scipy.sparse.linalg.eigsh` returns them.

    This is the Lanczos method with full reorthogonalization and thick restarts. The basis has `ncv` vectors, however
    many products are needed, and rounding does not create copies of an eigenvalue. A multiple eigenvalue may be found
    fewer times than its multiplicity, as with any method that uses a single starting vector.

    Args:
        a: A symmetric matrix of shape `(n, n)`: a curvature operator, an expression of operators such as `2 * h + g`,
            an array or a tensor, a sparse matrix or a `LinearOperator` of SciPy, or any object with `shape` and
            `a @ v`.
        k: Number of eigenvalues.
        which: `"LA"` for the largest, `"SA"` for the smallest, `"LM"` for those of largest magnitude, `"BE"` for half
            of them from each end, with one more from the upper end if `k` is odd.
        ncv: Number of vectors in the basis, more than `k`. Default: `max(2 * k + 1, 20)`. A larger basis needs fewer
            products.
        max_restarts: Maximum number of restarts, 100 by default.
        tol: An eigenvalue has converged if $\lVert A v - \lambda v \rVert \le$ `tol` $\lvert \lambda \rvert$.
            Default: the machine epsilon of the dtype to the power of 2/3, which is 2e-5 in float32 and 4e-11 in
            float64. It has also converged if the norm is at most 10 machine epsilons times the largest magnitude of
            all eigenvalues, which is about the rounding error of a product.
        seed: An integer that seeds the starting vector.

    Returns:
        `(eigenvalues, eigenvectors)`: the eigenvalues in ascending order, of shape `(k,)`, and orthonormal eigenvectors
        in columns, of shape `(n, k)`. A column can be multiplied with `@`. Both are in double precision, or in single
        precision if the matrix is in single or half precision.

    Raises:
        EigenvalueConvergenceError: If an eigenvalue has not converged after `max_restarts`. The attributes of the error
            hold the approximations.
        FloatingPointError: If a product is not finite.
        ValueError: If the matrix is not symmetric, or an option is invalid.

    Cost:
        About ten to a few hundred products, and memory for a few more than `ncv + 1` vectors.

    Example:

    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> values, vectors = kg.curvature.eigsh(np.diag([1.0, 2.0, 3.0]), k=2)
    >>> values.round(6), np.abs(vectors).round(6) + 0.0
    (array([2., 3.]), array([[0., 0.],
           [1., 0.],
           [0., 1.]]))

    Source: Wu & Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems" (2000), algorithm 1.
    """
    a = symmetric_matrix("eigsh", a)
    n, dtype = a.shape[0], precision_of(a)
    _require_options(n, k, which, ncv, max_restarts, tol)
    validation.require_seed("eigsh", seed)
    matvec = matvec_of(a)
    ncv = min(n, max(2 * k + 1, 20) if ncv is None else ncv)
    max_restarts = MAX_RESTARTS if max_restarts is None else max_restarts
    eps = np.finfo(dtype).eps
    tol = tol or eps ** (2 / 3)
    generator = np.random.default_rng(seed)
    basis = KrylovBasis(ncv + 1, n, dtype)
    projected = np.zeros((ncv, ncv))
    basis.append_random(generator)
    with progress_of(a, "eigsh", None) as bar:
        for _ in range(max_restarts + 1):
            remainder = _extend(matvec, basis, projected, ncv, n, generator, bar)
            values, vectors = np.linalg.eigh(projected)
            wanted = np.sort(_order(values, which)[:k])
            residuals = remainder * np.abs(vectors[-1, wanted])
            # The rounding error of a product is proportional to the largest eigenvalue.
            allowed = np.maximum(tol * np.abs(values[wanted]), _ROUNDING * eps * np.abs(values).max())
            converged = int((residuals <= allowed).sum())
            relative = np.max(residuals / np.maximum(np.abs(values[wanted]), np.finfo(dtype).tiny))
            bar.note(f"{converged} of {k} eigenvalues converged, residual {relative:.1e}")
            if converged == k or ncv == n:
                basis.count = ncv
                return values[wanted].astype(dtype), basis.combined(vectors[:, wanted])
            retained = np.sort(_order(values, which)[: k + int(_EXTRA_SHARE * (ncv - 1 - k))])
            _restart(basis, projected, values, vectors, retained, ncv)
    # The last restart has put the wanted Ritz vectors among the first vectors of the basis.
    inside = np.isin(retained, wanted)
    found = values[retained][inside].astype(dtype)
    raise EigenvalueConvergenceError(
        f"{int((residuals > allowed).sum())} of {k} eigenvalues did not converge to the relative residual "
        f"{tol:.1g} in {max_restarts} restarts: the residuals are {np.array2string(residuals, precision=2)}. Allow a "
        "larger `ncv`, more `max_restarts` or a larger `tol`. The attributes of this error have the approximations.",
        found,
        basis.combined(np.eye(basis.count)[:, : len(retained)][:, inside]),
        residuals,
    )


def _extend(matvec, basis, projected, ncv, n, generator, bar):
    """Fills the basis. Returns the norm of the component of the last product that is orthogonal to it."""
    remainder = 0.0
    for j in range(basis.count - 1, ncv):
        product = np.array(matvec(basis[j]), dtype=basis[j].dtype)
        length = require_finite_length(product)
        parts, remainder = basis.orthogonalize(product)
        projected[: j + 1, j] = projected[j, : j + 1] = parts
        bar.update()
        if j + 1 == n:
            return 0.0
        if remainder <= 10 * np.finfo(product.dtype).eps * length:
            # The basis spans an invariant subspace, so the remainder is rounding noise.
            remainder = 0.0
            basis.append_random(generator)
        else:
            basis.append(product, remainder)
    return remainder


def _restart(basis, projected, values, vectors, retained, ncv):
    """Keeps some Ritz vectors, followed by the vector that was to extend the basis next."""
    basis.count = ncv
    basis.replace(vectors[:, retained])
    basis.move(ncv, basis.count)
    basis.count += 1
    projected[:] = 0.0
    projected[np.arange(len(retained)), np.arange(len(retained))] = values[retained]


def _order(values, which):
    """The indices of ascending values, sorted by how much they are wanted."""
    places = np.arange(len(values))
    if which == "SA":
        return places
    if which == "LA":
        return places[::-1]
    if which == "LM":
        return np.argsort(-np.abs(values), kind="stable")
    # "BE": both ends in turn, starting with the upper one.
    ends = np.empty_like(places)
    ends[0::2] = places[::-1][: len(ends[0::2])]
    ends[1::2] = places[: len(ends[1::2])]
    return ends


def _require_options(n, k, which, ncv, max_restarts, tol):
    validation.require_choice("eigsh", "which", which, WHICH)
    if not validation.is_count(k) or k > n:
        raise validation.refused("eigsh", f"an integer from 1 to {n}, the size of the matrix,", "k", k)
    if ncv is not None and (not validation.is_count(ncv) or not (k < ncv or k == ncv == n)):
        raise validation.refused("eigsh", f"an integer above k={k}, the vectors of its basis,", "ncv", ncv)
    validation.require_count("eigsh", "max_restarts", max_restarts, 0, may_be_none=True)
    validation.require_number("eigsh", "tol", tol, least=0, may_be_none=True)
