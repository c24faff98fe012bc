"""What the products of earlier systems tell conjugate gradients about the next one."""

import numpy as np

from keras_gradtools import validation
from keras_gradtools.curvature.krylov_basis import norm

# Numbers in the vectors, by default: 4 MiB in single precision, and in a saved file. More are slow to go through.
_NUMBERS = 2**20
# By default, this rank at most; and none where there is not even room for the least.
_RANK, _LEAST_RANK = 100, 8
# A system that took fewer products changes nothing: the preconditioner was good, and they tell little that is new.
_LEAST_PRODUCTS = 10
# Of the squared length of a direction, what must be left of it outside the others: of the new ones, to rounding; of the
# former ones, of which what is left is known only by a matrix that has changed since.
_LEAST_NEW, _LEAST_FORMER = 1e-3, 0.3
# Of the largest eigenvalue: what is missed is taken to be this much before it was seen, and no less than that.
_FIRST_MISSED, _LEAST_MISSED = 1e-2, 1e-3
# Of the largest eigenvalue: where it can be brought down to no less, that is not worth what it costs.
_LARGEST_SHARE = 0.1
# So many systems are let pass at most before it is found out whether it is worth it by now.
_LONGEST_WAIT = 15


def checked_rank(owner, rank):
    """What was given as `preconditioner_rank`; `ValueError` if it is none."""
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 0):
        raise ValueError(
            f"{owner} expects an integer of 0 or more, or None, as `preconditioner_rank`. Received: "
            f"preconditioner_rank={validation.describe(rank)}."
        )
    return rank


def recycled_preconditioner(size, rank, dtype):
    """One for weights of this number and dtype; None where its rank is 0, or, by default, where too few have room."""
    if rank is None:
        rank = min(_RANK, _NUMBERS // max(size, 1))
        rank = rank if rank >= _LEAST_RANK else 0
    rank = min(rank, size)
    # As in the solvers: half precision is no precision to solve in.
    return RecycledPreconditioner(size, rank, "float64" if dtype == "float64" else "float32") if rank else None


class RecycledPreconditioner:
    r"""Approximate eigenpairs of a sequence of symmetric matrices $B$ that change slowly, and a preconditioner of them.

    With eigenvectors in the rows of $U$ and eigenvalues $w_i$ it is

    $$M^{-1} v = v + U^\top \operatorname{diag}(f_i - 1) \, U v, \qquad
    f_i = \min\Big(\frac{\sigma + \lambda}{|w_i| + \lambda}, 1\Big),$$

    which brings the largest eigenvalues of $B + \lambda I$ down to $\sigma + \lambda$, and negative ones to their
    absolute value. The pairs cost no product: conjugate gradients multiply $B$ by directions $P$ in any case, and
    $Y = P B$ is what is known of $B$ exactly. What is taken for $B$ is the symmetric matrix that fits this, and changes
    what was taken for it before, $s I + U^\top \operatorname{diag}(w - s) \, U$ with the smallest $|w_i|$ for $s$, the
    least (the Powell-symmetric-Broyden update for several pairs), on the span of $P$ and of what $U$ has outside it;
    its eigenpairs of largest magnitude are kept. Before that, no $|w_i|$ is taken to be more than
    $|q^\top B q| / \lVert p \rVert^2$, with $p$ the part of $u_i$ in the span of $P$ and $q$ its direction: more than
    that no eigenvalue of a positive semidefinite matrix can be.

    $\sigma$ is the smallest $|w_i|$, or the curvature that the former vectors missed of a new matrix, the largest
    $|w_i| \, (1 - \lVert U_\text{former} u_i \rVert^2)$, if that is more. A lower one would part an eigenvalue that is
    brought down from what is missed of it: two instead of one, and more products instead of fewer. Where $\sigma$ is
    more than a tenth of the largest $|w_i|$ there is no preconditioner, and after 1, 3, 7, 15, 15, ... systems more it
    is seen whether that has changed.

    Attributes:
        vectors: $U$, orthonormal rows; those of zeros after them have nothing in them yet. Shape `(rank, n)`.
        values: $w$, of descending magnitude, with zeros for the latter. Shape `(rank,)`.
        missed: the curvature that was missed of the last matrix, by the first `rank` products with it.
        wait, waited: how many systems to let pass before the pairs are made anew, and how many have passed.

    Cost:
        For each product, `4 * rank * n` multiplications and additions; for each system of ten products or more, some
        `16 * rank**2 * n`. Memory of `3 * rank` vectors, and up to seven times `rank` while pairs are made.

    Source: Gratton, Sartenaer & Tshimanga, "On a class of limited memory preconditioners for large scale linear systems
    with multiple right-hand sides" (2011), the spectral one; Schnabel, "Quasi-Newton methods using multiple secant
    equations" (1983).
    """

    def __init__(self, size, rank, dtype):
        self.vectors, self.values, self.missed = np.zeros((rank, size), dtype), np.zeros(rank), 0.0
        self.wait, self.waited = 0, 0
        self._directions, self._products = (np.empty((rank, size), dtype) for _ in range(2))
        self._count, self._is_new = 0, True

    def of(self, damping):
        r"""$M^{-1}$ for this $\lambda$, as `kg.curvature.conjugate_gradients` takes it; None for no preconditioner."""
        vectors, values = self._pairs()
        lowest = self._lowest()
        if lowest is None:
            return None
        values = np.abs(values)
        factors = np.minimum((lowest + damping) / (values + damping), 1.0) - 1.0
        factors = factors.astype(vectors.dtype)
        return lambda v: v + (factors * (vectors @ v)) @ vectors

    def begin(self):
        """Before the systems with a new matrix."""
        self._count, self._is_new = 0, True

    def record(self, direction, product):
        """Takes note of a product of the matrix, without damping."""
        if self.waited < self.wait:
            self._count += 1
            return
        length = norm(direction)
        if not 0.0 < length < np.inf:
            return
        with np.errstate(over="ignore"):
            product = np.asarray(product, self.vectors.dtype) / length
        if not np.isfinite(product).all():
            return
        if self._count == len(self.values):
            self._absorb()
        self._directions[self._count], self._products[self._count] = direction / length, product
        self._count += 1

    def finish(self):
        """After a system: makes what was noted part of the preconditioner."""
        if self._count >= min(_LEAST_PRODUCTS, len(self.values)):
            if self.waited < self.wait:
                self.waited += 1
            else:
                self._absorb()
                is_full = bool(self.values[-1])
                self.wait = min(2 * self.wait + 1, _LONGEST_WAIT) if is_full and self._lowest() is None else 0
                self.waited = 0
        self._count = 0

    def _lowest(self):
        """What eigenvalues are brought down to; None where that is not worth it."""
        _, values = self._pairs()
        if not len(values):
            return None
        largest = np.abs(values[0])
        lowest = max(np.abs(values[-1]), self.missed, _LEAST_MISSED * largest)
        return lowest if lowest <= _LARGEST_SHARE * largest else None

    @np.errstate(over="ignore", invalid="ignore")
    def _absorb(self):
        new, products = self._directions[: self._count], self._products[: self._count]
        self._count = 0
        # All is done in coefficients: what is as long as the weights is gone through by products of matrices alone.
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
        # The former vectors without their parts along the new directions, of which an orthonormal basis is made.
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
            # Within the systems of one matrix, the former vectors are already its own.
            known = np.sum(((overlap @ of_new + of_former) @ chosen) ** 2, axis=0)
            self.missed = np.max(np.abs(self.values[: len(known)]) * np.maximum(1.0 - known, 0.0))
            self._is_new = False

    def _keep(self, matrix, basis):
        """Takes the pairs of a matrix on a basis: for each part of it, coefficients in columns, and rows.

        Returns the eigenvectors on that basis, in columns; None if anything is not finite, and nothing changed.
        """
        if not np.isfinite(matrix).all():
            return None
        values, vectors = np.linalg.eigh(matrix)
        largest = np.argsort(-np.abs(values), kind="stable")[: len(self.values)]
        if not np.isfinite(values.astype(self.vectors.dtype)).all():
            return None
        found = sum((part @ vectors[:, largest]).T.astype(rows.dtype) @ rows for part, rows in basis)
        # Directions may have been nearly parallel: what rounding left of that is taken out.
        found -= (0.5 * (_double(found @ found.T) - np.eye(len(found)))).astype(found.dtype) @ found
        # New arrays: what was returned for the former ones may be in use.
        self.vectors, self.values = np.zeros_like(self.vectors), np.zeros_like(self.values)
        self.vectors[: len(largest)], self.values[: len(largest)] = found, values[largest]
        return vectors[:, largest]

    def _pairs(self):
        found = np.count_nonzero(self.values)
        return self.vectors[:found], self.values[:found]


def _double(matrix):
    return matrix.astype("float64")


def _limits(along, matrix):
    """What the eigenvalues of vectors cannot exceed, from their parts along directions that the matrix is known on."""
    share = np.sum(along**2, axis=1)
    seen = np.abs(np.sum((along @ matrix) * along, axis=1))
    return np.divide(seen, share**2, out=np.full(len(share), np.inf), where=share**2 > 0.0)


def _whitened(gram, least, is_relative=True):
    """An orthonormal basis of vectors with this Gram matrix, in coefficients in columns; without what is too short."""
    values, vectors = np.linalg.eigh(gram)
    kept = values > least * (values[-1] if is_relative else 1.0)
    return vectors[:, kept] / np.sqrt(values[kept])
