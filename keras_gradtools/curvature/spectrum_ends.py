"""Both ends of a spectrum to the precision that watching it needs, and the trace beside them, by few products."""

from typing import Any, NamedTuple

import numpy as np

from keras_gradtools.curvature.krylov_basis import KrylovBasis, checked_length, dot, norm
from keras_gradtools.curvature.trace import mean_of, random_signs

# What a random direction has of the vector to begin with, so that no eigenvector is missed for good.
_RANDOM_SHARE = 0.3
# Products before both ends can be told from what lies between them.
_FEWEST = 4


class SpectrumEnds(NamedTuple):
    """What is known of a symmetric matrix from a few products.

    Attributes:
        smallest, largest: its eigenvalues at both ends.
        start: a vector to begin with where the matrix has changed by a little.
        trace: an `Estimate`, or None.
        matvecs: the products that were taken.
    """

    smallest: float
    largest: float
    start: Any
    trace: Any
    matvecs: int


def spectrum_ends(matvec, n, *, tol, most, start=None, samples=0, seed=0, dtype=np.float64):
    r"""Both ends by Lanczos' method without restarts, until each is within `tol` of the largest magnitude.

    The error of a Ritz value with residual r at a distance d from the other eigenvalues is below $\min(r, r^2 / d)$. Of
    those only the Ritz values are known, so that the last product must have moved neither end by more than half of what
    is allowed. After `most` products they are taken as they are. The trace is that of the matrix in the basis, which is
    exact, and the mean of `samples` random vectors beside it: what is large in the matrix is in the basis.

    Source: Parlett, "The symmetric eigenvalue problem" (1998), section 11.7; Meyer et al., "Hutch++" (2021).
    """
    most = min(most, n)
    generator = np.random.default_rng(seed)
    basis = KrylovBasis(most + 1, n, dtype)
    first = generator.standard_normal(n).astype(dtype)
    if start is not None:
        first = start + (_RANDOM_SHARE / norm(first)) * first
    basis.append(first, norm(first))
    projected, values = np.zeros((most, most)), np.zeros(0)
    for j in range(most):
        product = np.array(matvec(basis[j]), dtype=dtype)
        length = checked_length(product)
        parts, remainder = basis.orthogonalize(product)
        projected[j, j] = parts[j]
        before = values
        values, vectors = np.linalg.eigh(projected[: j + 1, : j + 1])
        if j + 1 == n or _is_enough(before, values, remainder * np.abs(vectors[-1]), tol):
            break
        if remainder <= 10 * np.finfo(dtype).eps * length:
            # An invariant subspace: the rest is another one.
            basis.append_random(generator)
        elif j + 1 < most:
            projected[j, j + 1] = projected[j + 1, j] = remainder
            basis.append(product, remainder)
    count = len(values)
    basis.count = count
    ends = basis.combined(vectors[:, [0, -1]])
    trace, taken = None, count
    if samples:
        sampled = []
        for _ in range(samples):
            v = random_signs(generator, n).astype(dtype)
            basis.orthogonalize(v)
            sampled.append(dot(v, matvec(v)))
        rest = mean_of(sampled)
        trace, taken = rest._replace(value=float(values.sum()) + rest.value), count + samples
    return SpectrumEnds(float(values[0]), float(values[-1]), ends.sum(axis=1), trace, taken)


def _is_enough(before, values, residuals, tol):
    """Whether both ends are near enough, and have stopped to move."""
    if len(values) < _FEWEST:
        return False
    allowed = tol * np.abs(values).max()
    moved = max(before[0] - values[0], values[-1] - before[-1])
    gaps = values[1] - values[0], values[-1] - values[-2]
    errors = [min(r, r**2 / d) if d > 0 else r for r, d in zip(residuals[[0, -1]], gaps, strict=True)]
    return moved <= allowed / 2 and max(errors) <= allowed
