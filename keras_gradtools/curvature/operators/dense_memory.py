"""Memory of dense matrices: a check before they are computed, and a symmetrization in place."""

import numpy as np

from keras_gradtools import memory

# Largest share of the memory that a matrix may take. Its computation and its use need the rest.
_SHARE = 0.5
# Side of a square tile that fits into the cache together with its mirror image.
_TILE = 256


_WITHOUT_FORMING = (
    "Use it without forming it: `operator @ vector`, `eigsh`, `trace`, `diagonal` or "
    "`kg.curvature.conjugate_gradients`. Or take fewer variables, such as those of one layer."
)


def require_room(owner, n, dtype, advice=_WITHOUT_FORMING):
    """Raises `MemoryError` if a matrix of shape `(n, n)` would take more than half of the machine's memory."""
    needed, there = n * n * np.dtype(dtype).itemsize, memory.machine_bytes()
    if needed > _SHARE * there:
        raise MemoryError(
            f"The matrix of this {owner} would have the shape ({n}, {n}) and take {_gigabytes(needed)}, and this "
            f"machine has {_gigabytes(there)}. {advice}"
        )


def symmetrize(matrix, slices):
    """Makes a square array symmetric, in place.

    `slices` divides it into blocks. Blocks below the diagonal are overwritten by the transposed blocks above it. Blocks
    on the diagonal are averaged with their transpose.
    """
    for place in slices:
        for i in range(place.start, place.stop, _TILE):
            rows = slice(i, min(i + _TILE, place.stop))
            for j in range(i, place.stop, _TILE):
                columns = slice(j, min(j + _TILE, place.stop))
                mean = 0.5 * (matrix[rows, columns] + matrix[columns, rows].T)
                matrix[rows, columns], matrix[columns, rows] = mean, mean.T
            for j in range(place.stop, len(matrix), _TILE):
                columns = slice(j, j + _TILE)
                matrix[columns, rows] = matrix[rows, columns].T


def _gigabytes(size):
    return f"{size / 2**30:.3g} GiB"
