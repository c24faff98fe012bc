"""Some eigenvalues of a symmetric matrix that is known by its products."""

import contextlib

import numpy as np

from keras_gradtools import validation
from keras_gradtools.curvature.krylov_basis import KrylovBasis, checked_length

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

    def __init__(self, message, eigenvalues, eigenvectors, residuals):
        super().__init__(message)
        self.eigenvalues, self.eigenvectors, self.residuals = eigenvalues, eigenvectors, residuals


def eigsh(matvec, n, k, which, *, ncv=None, max_restarts=None, tol=None, seed=0, dtype=np.float64, progress=None):
    """Eigenvalues and eigenvectors of a symmetric matrix by thick-restart Lanczos, as `scipy.sparse.linalg.eigsh`.

    `matvec` is a function of NumPy vectors of length `n`. The basis has `ncv + 1` vectors, which are all kept
    orthogonal, so that rounding does not create copies of an eigenvalue.
    """
    _check(n, k, which, ncv, max_restarts, tol)
    validation.require_seed("eigsh", seed)
    ncv = min(n, max(2 * k + 1, 20) if ncv is None else ncv)
    max_restarts = MAX_RESTARTS if max_restarts is None else max_restarts
    eps = np.finfo(dtype).eps
    tol = tol or eps ** (2 / 3)
    generator = np.random.default_rng(seed)
    basis = KrylovBasis(ncv + 1, n, dtype)
    projected = np.zeros((ncv, ncv))
    basis.append_random(generator)
    with progress(None) if progress else contextlib.nullcontext() as bar:
        for _ in range(max_restarts + 1):
            remainder = _extend(matvec, basis, projected, ncv, n, generator, bar)
            values, vectors = np.linalg.eigh(projected)
            wanted = np.sort(_order(values, which)[:k])
            residuals = remainder * np.abs(vectors[-1, wanted])
            # The rounding error of a product is proportional to the largest eigenvalue.
            allowed = np.maximum(tol * np.abs(values[wanted]), _ROUNDING * eps * np.abs(values).max())
            if np.all(residuals <= allowed) or ncv == n:
                basis.count = ncv
                return values[wanted].astype(dtype), basis.combined(vectors[:, wanted])
            kept = np.sort(_order(values, which)[: k + int(_EXTRA_SHARE * (ncv - 1 - k))])
            _restart(basis, projected, values, vectors, kept, ncv)
    # The last restart has put the wanted Ritz vectors among the first vectors of the basis.
    inside = np.isin(kept, wanted)
    found = values[kept][inside].astype(dtype)
    raise EigenvalueConvergenceError(
        f"{int((residuals > allowed).sum())} of {k} eigenvalues did not converge to the relative residual "
        f"{tol:.1g} in {max_restarts} restarts: the residuals are {np.array2string(residuals, precision=2)}. Allow a "
        "larger `ncv`, more `max_restarts` or a larger `tol`. The attributes of this error have the approximations.",
        found,
        basis.combined(np.eye(basis.count)[:, : len(kept)][:, inside]),
        residuals,
    )


def _extend(matvec, basis, projected, ncv, n, generator, bar):
    """Fills the basis. Returns the norm of the last product's component orthogonal to it."""
    remainder = 0.0
    for j in range(basis.count - 1, ncv):
        product = np.array(matvec(basis[j]), dtype=basis[j].dtype)
        length = checked_length(product)
        parts, remainder = basis.orthogonalize(product)
        projected[: j + 1, j] = projected[j, : j + 1] = parts
        if bar is not None:
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


def _restart(basis, projected, values, vectors, kept, ncv):
    """Keeps some Ritz vectors, followed by the vector that was to extend the basis next."""
    basis.count = ncv
    basis.replace(vectors[:, kept])
    basis.move(ncv, basis.count)
    basis.count += 1
    projected[:] = 0.0
    projected[np.arange(len(kept)), np.arange(len(kept))] = values[kept]


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


def _check(n, k, which, ncv, max_restarts, tol):
    if not validation.is_one_of(which, WHICH):
        raise ValueError(
            f"eigsh expects `which` to be one of {', '.join(WHICH)}. Received: which={validation.shown(which)}."
        )
    if not _is_count(k) or not 0 < k <= n:
        raise ValueError(f"eigsh expects `k` from 1 to {n}, the size of the matrix. Received: k={validation.shown(k)}.")
    if ncv is not None and (not _is_count(ncv) or not (k < ncv or k == ncv == n)):
        raise ValueError(
            f"eigsh expects `ncv`, the vectors of its basis, above k={k}. Received: ncv={validation.shown(ncv)}."
        )
    if max_restarts is not None and (not _is_count(max_restarts) or max_restarts < 0):
        raise ValueError(
            f"eigsh expects 0 or more as `max_restarts`. Received: max_restarts={validation.shown(max_restarts)}."
        )
    if tol is not None and not (validation.is_number(tol) and tol >= 0):
        raise ValueError(f"eigsh expects a number of 0 or more as `tol`. Received: tol={validation.shown(tol)}.")


def _is_count(x):
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)
