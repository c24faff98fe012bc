"""Whether a matrix fits into memory, said before it is computed."""

import os

import numpy as np

# Beside the matrix, its transpose and what is computed need room.
_SHARE = 0.5


def check(owner, n, dtype):
    """Raises `MemoryError` if a matrix of shape `(n, n)` would take more than half of the machine's memory."""
    needed, there = n * n * np.dtype(dtype).itemsize, _physical_memory()
    if needed > _SHARE * there:
        raise MemoryError(
            f"The dense form of this {owner} would be a matrix of shape ({n}, {n}), {_gigabytes(needed)}, and this "
            f"machine has {_gigabytes(there)}. Use it without forming it: `operator @ vector`, `eigsh`, `trace`, "
            "`diagonal` or `kg.curvature.conjugate_gradients`; or take fewer variables, one layer's for example."
        )


def _physical_memory():
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 16 * 2**30


def _gigabytes(size):
    return f"{size / 2**30:.3g} GiB"
