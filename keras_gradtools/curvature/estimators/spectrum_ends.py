"""The smallest and the largest eigenvalue with moderate precision, and an estimate of the trace, from few products."""

from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_gradtools.curvature.estimators.krylov_basis import KrylovBasis, dot, norm, require_finite_length
from keras_gradtools.curvature.estimators.trace import mean_of

# Length of the random part of the starting vector. Without it, eigenvectors orthogonal to `start` would not be found.
_RANDOM_SHARE = 0.3
# Fewest products that the tests of convergence require.
_FEWEST = 4
# Number of steps that `begin` takes. They are usually enough if the matrix has changed little since the last call.
_STEPS_AT_ONCE = 5
# After one Gram-Schmidt pass, a remainder below this fraction is rounding noise.
_CLEAR_SHARE = 1e-3


class SpectrumEnds(NamedTuple):
    """The ends of the spectrum of a symmetric matrix, and its trace, estimated from a few products.

    Attributes:
        smallest, largest: The smallest and the largest eigenvalue.
        start: A starting vector for a later call, when the matrix has changed a little.
        trace: An `Estimate`, or None.
        matvecs: Number of products.
    """

    smallest: float
    largest: float
    start: Any
    trace: Any
    matvecs: int


def spectrum_ends(matvec, n, *, tol, most, start=None, samples=0, seed=0, dtype=np.float64, begin=None):
    r"""Finds both ends of the spectrum by the Lanczos method without restarts.

    The error is about `tol` times the larger magnitude of the two. The error of a Ritz value with residual r and
    distance d from the other eigenvalues is below $\min(r, r^2 / d)$. Since d is only known from the other Ritz values,
    the last product must also have moved neither end by more than half the tolerance. After `most` products, the Ritz
    values are returned without these tests.

    The trace is the exact trace of the matrix on the basis, plus the mean of v' A v over `samples` random vectors v
    orthogonal to it. The basis contains the largest eigenvalues, so the samples have little variance.

    `begin(start, bits, share, steps)`, if given, takes the first steps and the samples. It returns a `SpectrumStart`.

    Source: Parlett, "The symmetric eigenvalue problem" (1998), section 11.7; Meyer et al., "Hutch++" (2021).
    """
    most = min(most, n)
    generator = np.random.default_rng(seed)
    bits = _random_bits(generator, 1 + samples, n)
    start = np.zeros(n, dtype) if start is None else start
    basis, ritz, trace, is_done = KrylovBasis(most + 1, n, dtype), _RitzValues(most), None, False
    if begin is None or most <= _STEPS_AT_ONCE:
        signs = _signs(bits[0], dtype)
        first = start + (_RANDOM_SHARE / norm(signs)) * signs
        basis.append(first, norm(first))
    else:
        begun = begin(start, bits, _RANDOM_SHARE, _STEPS_AT_ONCE)
        diagonal, remainders, sampled = map(_finite, (begun.diagonal, begun.remainders, begun.samples))
        clear = _count_clear(diagonal, remainders)
        for step in range(clear):
            ritz.add(diagonal[step], remainders[step])
        if clear == _STEPS_AT_ONCE:
            trace = _trace(diagonal, sampled)
            is_done = ritz.is_enough(tol)
        rows = ops.convert_to_numpy(begun.rows)
        if is_done:
            ends = ritz.vectors[:, [0, -1]].sum(axis=1).astype(dtype)
            return SpectrumEnds(ritz.smallest, ritz.largest, ends @ rows[:clear], trace, clear + samples)
        for row in rows[: clear + 1]:
            basis.append(row, 1.0)
    while not is_done:
        j = ritz.count
        product = np.array(matvec(basis[j]), dtype=dtype)
        length = require_finite_length(product)
        parts, remainder = basis.orthogonalize(product)
        # If the basis spans an invariant subspace, the remainder is rounding noise.
        is_invariant = remainder <= 10 * np.finfo(dtype).eps * length
        ritz.add(parts[j], 0.0 if is_invariant else remainder)
        is_done = ritz.count == most or ritz.is_enough(tol)
        if not is_done and is_invariant:
            basis.append_random(generator)
        elif not is_done:
            basis.append(product, remainder)
    if samples and trace is None:
        sampled = []
        for row in bits[1:]:
            v = _signs(row, dtype)
            basis.orthogonalize(v)
            sampled.append(dot(v, matvec(v)))
        trace = _trace(ritz.values, sampled)
    start = basis.combined(ritz.vectors[:, [0, -1]]).sum(axis=1)
    return SpectrumEnds(ritz.smallest, ritz.largest, start, trace, ritz.count + samples)


class _RitzValues:
    """The Ritz values: the eigenvalues, ascending, of the matrix projected onto the Lanczos basis so far."""

    def __init__(self, most):
        self._projected = np.zeros((most, most))
        self._coupling = 0.0
        self._former = self.values = np.zeros(0)
        self.vectors = np.zeros((0, 0))
        self.count = 0

    def add(self, diagonal, coupling):
        """Adds one more vector of the basis. `coupling` is the matrix element between it and the next vector."""
        j = self.count
        self._projected[j, j] = diagonal
        if j:
            self._projected[j, j - 1] = self._projected[j - 1, j] = self._coupling
        self._coupling, self._former, self.count = coupling, self.values, j + 1
        self.values, self.vectors = np.linalg.eigh(self._projected[: j + 1, : j + 1])

    @property
    def smallest(self):
        return float(self.values[0])

    @property
    def largest(self):
        return float(self.values[-1])

    def is_enough(self, tol):
        """Whether both ends are precise enough and have stopped moving."""
        values, former = self.values, self._former
        if len(values) < _FEWEST:
            return False
        allowed = tol * np.abs(values).max()
        moved = max(former[0] - values[0], values[-1] - former[-1])
        residuals = self._coupling * np.abs(self.vectors[-1, [0, -1]])
        gaps = values[1] - values[0], values[-1] - values[-2]
        errors = [min(r, r**2 / d) if d > 0 else r for r, d in zip(residuals, gaps, strict=True)]
        return moved <= allowed / 2 and max(errors) <= allowed


def _count_clear(diagonal, remainders):
    """The number of leading steps whose remainder is not rounding noise."""
    lengths = np.sqrt(diagonal**2 + remainders**2 + np.append(0.0, remainders[:-1]) ** 2)
    short = np.flatnonzero(remainders <= _CLEAR_SHARE * lengths)
    return int(short[0]) if len(short) else len(remainders)


def _trace(diagonal, sampled):
    """The trace on the basis plus the mean of samples of the rest. None without samples."""
    if not len(sampled):
        return None
    rest = mean_of(sampled)
    return rest._replace(value=float(np.sum(diagonal)) + rest.value)


def _finite(tensor):
    numbers = np.asarray(ops.convert_to_numpy(tensor), "float64")
    for number in numbers:
        require_finite_length(np.array([number]))
    return numbers


def _random_bits(generator, count, n):
    """Independent ones and zeros, of shape `(count, n)`."""
    drawn = np.frombuffer(generator.bytes(-(-count * n // 8)), "uint8")
    return np.unpackbits(drawn, count=count * n).reshape(count, n)


def _signs(bits, dtype):
    return 2 * bits.astype(dtype) - 1
