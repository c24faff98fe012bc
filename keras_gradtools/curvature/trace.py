"""The trace of a symmetric matrix from products with random vectors."""

import numpy as np

from keras_gradtools import validation
from keras_gradtools.curvature.estimate import Estimate
from keras_gradtools.curvature.krylov_basis import KrylovBasis, dot

METHODS = ("hutch++", "hutchinson")


def estimate_trace(matvec, n, matvecs, method, seed, dtype, progress):
    """The trace by Hutchinson's estimator or Hutch++: see `CurvatureOperator.trace`."""
    validation.require_seed("trace", seed)
    if not validation.is_one_of(method, METHODS):
        raise ValueError(
            f"trace expects 'hutch++' or 'hutchinson' as `method`. Received: method={validation.shown(method)}."
        )
    least = 6 if method == "hutch++" else 2
    matvecs = checked_budget("trace", matvecs, least)
    with progress(min(matvecs, n)) as bar:
        if matvecs >= n:
            return Estimate(float(sum(bar.after(matvec(unit))[i] for i, unit in enumerate(units(n)))), 0.0)
        generator = np.random.default_rng(seed)
        if method == "hutchinson":
            samples = []
            for _ in range(matvecs):
                v = random_signs(generator, n)
                samples.append(dot(v, bar.after(matvec(v))))
            return mean_of(samples)
        return _hutch_plus_plus(matvec, n, matvecs, generator, dtype, bar)


def _hutch_plus_plus(matvec, n, matvecs, generator, dtype, bar):
    """A third of the products finds large eigenvalues, a third computes their trace, the others sample the rest."""
    rank = matvecs // 3
    basis = KrylovBasis(rank, n, dtype)
    for _ in range(rank):
        sketched = np.array(bar.after(matvec(random_signs(generator, n))), dtype)
        size = dot(sketched, sketched) ** 0.5
        _, length = basis.orthogonalize(sketched)
        # If the matrix has a lower rank, the remainder is rounding noise.
        if length > 100 * np.finfo(dtype).eps * size:
            basis.append(sketched, length)
    exact = sum(dot(basis[i], bar.after(matvec(basis[i]))) for i in range(basis.count))
    samples = []
    for _ in range(matvecs - rank - basis.count):
        v = random_signs(generator, n).astype(dtype)
        basis.orthogonalize(v)
        samples.append(dot(v, bar.after(matvec(v))))
    rest = mean_of(samples)
    return Estimate(exact + rest.value, rest.standard_error)


def mean_of(samples):
    """The mean of samples, numbers or arrays, and its standard error."""
    samples = np.asarray(samples, "float64")
    error = samples.std(axis=0, ddof=1) / len(samples) ** 0.5
    if samples.ndim == 1:
        return Estimate(float(samples.mean()), float(error))
    return Estimate(samples.mean(axis=0), error)


def random_signs(generator, n):
    """A vector of independent random signs, the distribution that gives such estimates the lowest variance."""
    return (2.0 * generator.integers(0, 2, n, dtype="int8") - 1.0).astype("float32")


def units(n):
    """Yields the unit vectors, each time in the same array."""
    unit = np.zeros(n, "float32")
    for i in range(n):
        unit[i] = 1.0
        yield unit
        unit[i] = 0.0


def checked_budget(name, matvecs, least):
    """Returns the number of products as an int. Raises `ValueError` if it is below `least`."""
    if not validation.is_count(matvecs, least):
        raise ValueError(
            f"{name} expects at least {least} as `matvecs`, the number of products, since a standard error needs more "
            f"than one sample. Received: matvecs={validation.shown(matvecs)}."
        )
    return int(matvecs)
