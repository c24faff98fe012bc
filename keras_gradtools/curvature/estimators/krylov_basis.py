"""An orthonormal basis of a Krylov space, in one block of memory of fixed size."""

import numpy as np
from keras import ops

from keras_gradtools import backend

# Number of elements that are converted to double precision at once.
_BLOCK = 1 << 16
# Number of Gram-Schmidt passes. Two are always enough.
_PASSES = 2


class KrylovBasis:
    """Up to `capacity` orthonormal vectors of length `size`, stored in `dtype`. Sums are in double precision."""

    def __init__(self, capacity, size, dtype):
        self._rows = np.empty((capacity, size), dtype)
        self.count = 0

    def __getitem__(self, i):
        return self._rows[i]

    def orthogonalize(self, w):
        """Subtracts from `w`, in place, its projection onto the basis. Returns the coefficients and the new norm."""
        parts = np.zeros(self.count)
        for _ in range(_PASSES):
            found = self._products(w)
            self._subtract(found, w)
            parts += found
        return parts, norm(w)

    def append(self, w, length):
        """Appends `w / length`."""
        np.divide(w, length, out=self._rows[self.count], casting="same_kind")
        self.count += 1

    def append_random(self, generator):
        """Appends a random unit vector that is orthogonal to all others."""
        w = generator.standard_normal(self._rows.shape[1], dtype=self._rows.dtype.type)
        w /= norm(w)
        _, length = self.orthogonalize(w)
        self.append(w, length)

    def replace(self, combinations):
        """Replaces the vectors, in place, by `combinations.T @ basis`."""
        count = combinations.shape[1]
        for block in self._blocks():
            part = self._rows[: self.count, block].astype("float64")
            self._rows[:count, block] = combinations.T @ part
        self.count = count

    def combined(self, combinations):
        """`basis.T @ combinations`, vectors in columns."""
        columns = np.empty((self._rows.shape[1], combinations.shape[1]), self._rows.dtype)
        for block in self._blocks():
            columns[block] = self._rows[: self.count, block].astype("float64").T @ combinations
        return columns

    def move(self, source, target):
        """Overwrites the vector at `target` with the one at `source`."""
        self._rows[target] = self._rows[source]

    def _products(self, w):
        total = np.zeros(self.count)
        for block in self._blocks():
            total += self._rows[: self.count, block].astype("float64") @ w[block].astype("float64")
        return total

    def _subtract(self, parts, w):
        for block in self._blocks():
            w[block] -= (parts @ self._rows[: self.count, block].astype("float64")).astype(w.dtype)

    def _blocks(self):
        size = self._rows.shape[1]
        return (slice(start, start + _BLOCK) for start in range(0, size, _BLOCK))


def require_finite_length(product):
    """The norm of a product with the matrix. Raises `FloatingPointError` if it is not finite."""
    length = norm(product)
    if not np.isfinite(length):
        raise FloatingPointError(
            "A product with the matrix is not finite. Received: NaN or infinity in the curvature of the loss, at these "
            "weights and on this data."
        )
    return length


def dot(a, b):
    """The dot product of two vectors, summed in double precision."""
    return float(
        sum(
            np.dot(a[start : start + _BLOCK].astype("float64"), b[start : start + _BLOCK].astype("float64"))
            for start in range(0, len(a), _BLOCK)
        )
    )


def norm(a):
    """The norm of a vector, summed in double precision."""
    return dot(a, a) ** 0.5


def tensor_norm(v):
    """The norm of a vector in a tensor, in its dtype."""
    # Scaled, so that squares stay in range. `ops.sqrt` would round to single precision on some backends.
    largest = ops.max(ops.abs(v))
    divisor = ops.where(largest > 0, largest, ops.ones_like(largest))
    return largest * backend.dot(v / divisor, v / divisor) ** 0.5
