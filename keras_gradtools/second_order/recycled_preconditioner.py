"""A preconditioner for conjugate gradients, made from the products of earlier systems."""

from typing import Any

import numpy as np

from keras_gradtools import backend, validation
from keras_gradtools.curvature.estimators.krylov_basis import norm
from keras_gradtools.curvature.operators.solver_vectors import solver_dtype
from keras_gradtools.curvature.solvers.conjugate_gradient_loop import Preconditioner

# Default limit on the numbers in the vectors: 4 MiB in single precision, also in a saved file. More would be slow.
_NUMBERS = 2**20
# The largest default rank, and the smallest one. If even that exceeds `_NUMBERS`, there is no preconditioner.
_RANK, _LEAST_RANK = 100, 8
# A system with fewer products does not update the preconditioner, which was good: there is little to learn.
_LEAST_PRODUCTS = 10
# The least share of a direction's squared length that must be independent of the others. For new directions it only
# excludes rounding noise. For former ones it is higher, because they describe a matrix that has changed.
_LEAST_NEW, _LEAST_FORMER = 1e-3, 0.3
# Relative to the largest eigenvalue: the missed curvature before it was measured, and the lower bound of sigma.
_FIRST_MISSED, _LEAST_MISSED = 1e-2, 1e-3
# If the largest eigenvalue cannot be reduced to this share of it, the preconditioner is not worth its cost.
_LARGEST_SHARE = 0.1
# At most this many systems are skipped before the preconditioner is tried again.
_LONGEST_WAIT = 15


def require_rank(owner, rank):
    """Returns the argument `preconditioner_rank` as an int or None. Raises `ValueError` if it is invalid."""
    return validation.require_count(owner, "preconditioner_rank", rank, 0, may_be_none=True)


def recycled_preconditioner(size, rank, dtype):
    """A `RecycledPreconditioner` for `size` weights of this dtype. None if its rank, or the default rank, is 0."""
    if rank is None:
        rank = min(_RANK, _NUMBERS // max(size, 1))
        rank = rank if rank >= _LEAST_RANK else 0
    rank = min(rank, size)
    return RecycledPreconditioner(size, rank, solver_dtype(dtype)) if rank else None


class RecycledPreconditioner:
    r"""Approximate eigenpairs of a sequence of slowly changing symmetric matrices $B$, used as a preconditioner.

    With eigenvectors in the rows of $U$ and eigenvalues $w_i$, the preconditioner is

    $$M^{-1} v = v + U^\top \operatorname{diag}(f_i - 1) \, U v, \qquad
    f_i = \min\Big(\frac{\sigma + \lambda}{|w_i| + \lambda}, 1\Big).$$

    It reduces the largest eigenvalues of $B + \lambda I$ to about $\sigma + \lambda$. Negative eigenvalues enter with
    their absolute value.

    The pairs cost no extra products. Conjugate gradients multiply $B$ by directions $P$ anyway, so $Y = P B$ is known
    exactly. $B$ is approximated by the symmetric matrix that satisfies this equation and differs least from the former
    approximation $s I + U^\top \operatorname{diag}(w - s) \, U$, where $s$ is the smallest $|w_i|$. This is the
    Powell-symmetric-Broyden update for several pairs. It is computed on the span of $P$ and of the part of $U$ outside
    that span, and its eigenpairs of largest magnitude are retained. Before the update, each $|w_i|$ is limited to
    $|q^\top B q| / \lVert p \rVert^2$, where $p$ is the projection of $u_i$ onto the span of $P$ and
    $q = p / \lVert p \rVert$. No eigenvalue of a positive semi-definite matrix can exceed this.

    $\sigma$ is the largest of the smallest $|w_i|$, 1/1000 of the largest $|w_i|$, and the missed curvature: the
    largest $|w_i| \, (1 - \lVert U_\text{former} u_i \rVert^2)$, that is, how much of a new matrix the former vectors
    did not contain. With a smaller $\sigma$, an eigenvalue would be split into its reduced part and its missed part.
    Two eigenvalues instead of one need more products, not fewer. If $\sigma$ is more than a tenth of the largest
    $|w_i|$, there is no preconditioner, and it is tried again after skipping 1, 3, 7, 15, 15, ... systems.

    Attributes:
        vectors: $U$, orthonormal rows, followed by zeros in rows that are not in use yet. Shape `(rank, n)`.
        values: $w$ in order of descending magnitude, followed by zeros. Shape `(rank,)`.
        missed: The missed curvature of the last matrix, measured on the first `rank` products with it.
        wait, waited: Number of systems to skip before the pairs are updated again, and number skipped so far.
        state: `missed`, `wait` and `waited` in a list.

    Cost:
        For each product, `4 * rank * n` multiplications and additions. For each system of ten products or more, about
        `16 * rank**2 * n`. Memory for `3 * rank` vectors, and for up to `5 * rank` while pairs are updated.

    Source: Gratton, Sartenaer & Tshimanga, "On a class of limited memory preconditioners for large scale linear systems
    with multiple right-hand sides" (2011), the spectral one; Schnabel, "Quasi-Newton methods using multiple secant
    equations" (1983).
    """

    def __init__(self, size, rank, dtype):
        self._dtype = np.dtype(dtype)
        # An array or a tensor.
        self._vectors, self.values, self.missed = np.zeros((rank, size), dtype), np.zeros(rank), 0.0
        self.wait, self.waited = 0, 0
        self._restored: Any = None
        self._recorded: list[tuple[np.ndarray, np.ndarray]] = []
        self._count, self._is_new = 0, True

    @property
    def vectors(self):
        return backend.viewed(self._vectors)

    @property
    def state(self):
        return [self.missed, self.wait, self.waited]

    @property
    def has_new_pairs(self):
        """Whether the pairs have changed since `restore`."""
        return self._vectors is not self._restored

    def restore(self, vectors, values, state):
        """Takes the pairs and the state from elsewhere: a tensor or an array, and two arrays."""
        self._vectors = self._restored = vectors
        self.values, (self.missed, *waits) = values.astype("float64"), map(float, state)
        self.wait, self.waited = map(int, waits)

    def of(self, damping):
        r"""$M^{-1}$ for this $\lambda$, as `kg.curvature.conjugate_gradients` takes it. None for no preconditioner."""
        found, count = self.pairs_of(damping), np.count_nonzero(self.values)
        return None if found is None else Preconditioner(self.vectors[:count], found.factors[:count]).times

    def pairs_of(self, damping):
        """The same as a `Preconditioner`, with zeros in rows that are not in use yet. Its vectors may be a tensor."""
        lowest = self._lowest()
        if lowest is None:
            return None
        values = np.abs(self.values)
        factors = np.minimum((lowest + damping) / np.where(values, values + damping, 1.0), 1.0) - 1.0
        return Preconditioner(self._vectors, np.where(values, factors, 0.0).astype(self._dtype))

    def begin(self):
        """Call this before the first system with a new matrix."""
        self._forget()
        self._is_new = True

    def _forget(self):
        self._recorded, self._count = [], 0

    def record(self, direction, product):
        """Records a product of the matrix without damping."""
        length = norm(direction)
        if self.waited < self.wait:
            self._count += 1
        elif 0.0 < length < np.inf:
            with np.errstate(over="ignore"):
                product = np.asarray(product, self._dtype) / length
            self.record_all((direction / length)[None], product[None])

    def record_all(self, directions, products):
        """Records products with directions of norm 1: arrays with a row for each."""
        if self.waited < self.wait:
            self._count += len(directions)
            return
        directions, products = (x.astype(self._dtype, copy=False) for x in (directions, products))
        if not (np.isfinite(directions).all() and np.isfinite(products).all()):
            is_finite = np.isfinite(directions).all(axis=1) & np.isfinite(products).all(axis=1)
            directions, products = directions[is_finite], products[is_finite]
        while len(directions):
            if self._count == len(self.values):
                self._absorb()
            room = len(self.values) - self._count
            self._recorded.append((directions[:room], products[:room]))
            self._count += len(self._recorded[-1][0])
            directions, products = directions[room:], products[room:]

    def finish(self):
        """Call this after each system. Updates the preconditioner with the recorded products."""
        if self._count >= min(_LEAST_PRODUCTS, len(self.values)):
            if self.waited < self.wait:
                self.waited += 1
            else:
                self._absorb()
                is_full = bool(self.values[-1])
                self.wait = min(2 * self.wait + 1, _LONGEST_WAIT) if is_full and self._lowest() is None else 0
                self.waited = 0
        self._forget()

    def _lowest(self):
        r"""$\sigma$, to which eigenvalues are reduced. None if the preconditioner is not worth its cost."""
        _, values = self._pairs()
        if not len(values):
            return None
        largest = np.abs(values[0])
        lowest = max(np.abs(values[-1]), self.missed, _LEAST_MISSED * largest)
        return lowest if lowest <= _LARGEST_SHARE * largest else None

    @np.errstate(over="ignore", invalid="ignore")
    def _absorb(self):
        new, products = map(_joined, zip(*self._recorded, strict=True))
        self._forget()
        # Everything is computed in coefficients. Arrays as long as the weights only appear in matrix products.
        basis = _whitened(_double(new @ new.T), _LEAST_NEW)
        matrix = basis.T @ _double(new @ products.T) @ basis
        matrix = 0.5 * (matrix + matrix.T)
        former, values = self._pairs()
        if not len(values):
            self._keep(matrix, [(basis, new)])
            self.missed, self._is_new = _FIRST_MISSED * np.abs(self.values[0]), False
            return
        overlap = _double(former @ new.T)
        along = overlap @ basis
        values = np.sign(values) * np.minimum(np.abs(values), _limits(along, matrix))
        # An orthonormal basis of the components of the former vectors that are orthogonal to the new directions.
        left = np.eye(len(former)) - along @ along.T
        rest = _whitened(left, _LEAST_FORMER, is_relative=False)
        across = ((_double(former @ products.T) @ basis).T - matrix @ along.T) @ rest
        inside, smallest = left @ rest, np.abs(values).min()
        below = (inside.T * (values - smallest)) @ inside + smallest * np.eye(rest.shape[1])
        matrix = np.block([[matrix, across], [across.T, below]])
        of_new = np.hstack([basis, -basis @ along.T @ rest])
        of_former = np.hstack([np.zeros((len(former), basis.shape[1])), rest])
        chosen = self._keep(matrix, [(of_new, new), (of_former, former)])
        if self._is_new and chosen is not None:
            # Only for the first update with a new matrix. Later, the former vectors come from the same matrix.
            known = np.sum(((overlap @ of_new + of_former) @ chosen) ** 2, axis=0)
            self.missed = np.max(np.abs(self.values[: len(known)]) * np.maximum(1.0 - known, 0.0))
            self._is_new = False

    def _keep(self, matrix, basis):
        """Replaces the pairs by those of `matrix`, which is given in a basis.

        `basis` lists pairs of coefficients, in columns, and row vectors. The basis is the sum of their combinations.
        Returns the eigenvectors in that basis, in columns. If a number is not finite, it changes nothing and returns
        None.
        """
        if not np.isfinite(matrix).all():
            return None
        values, vectors = np.linalg.eigh(matrix)
        largest = np.argsort(-np.abs(values), kind="stable")[: len(self.values)]
        if not np.isfinite(values.astype(self._dtype)).all():
            return None
        count, size = len(largest), basis[0][1].shape[1]
        # A new array, since a function that `of` returned may still use the former one.
        found = np.zeros((len(self.values), size), self._dtype)
        part = np.empty((count, size), self._dtype)
        for coefficients, rows in basis:
            found[:count] += np.matmul((coefficients @ vectors[:, largest]).T.astype(self._dtype), rows, out=part)
        # Nearly parallel directions amplify rounding. This step makes the vectors orthonormal again.
        excess = 0.5 * (_double(found[:count] @ found[:count].T) - np.eye(count))
        found[:count] -= np.matmul(excess.astype(self._dtype), found[:count], out=part)
        self._vectors, self.values = found, np.zeros_like(self.values)
        self.values[:count] = values[largest]
        return vectors[:, largest]

    def _pairs(self):
        found = np.count_nonzero(self.values)
        return self.vectors[:found], self.values[:found]


def _joined(arrays):
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _double(matrix):
    return matrix.astype("float64")


def _limits(along, matrix):
    """Upper bounds for eigenvalues, from the coefficients of their vectors in a basis where the matrix is known."""
    share = np.sum(along**2, axis=1)
    seen = np.abs(np.sum((along @ matrix) * along, axis=1))
    return np.divide(seen, share**2, out=np.full(len(share), np.inf), where=share**2 > 0.0)


def _whitened(gram, least, is_relative=True):
    """Coefficients, in columns, of an orthonormal basis of vectors with this Gram matrix. Short ones are left out."""
    values, vectors = np.linalg.eigh(gram)
    significant = values > least * (values[-1] if is_relative else 1.0)
    return vectors[:, significant] / np.sqrt(values[significant])
