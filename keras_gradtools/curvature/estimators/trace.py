"""The trace of a matrix from products with random vectors."""

from typing import Literal

import numpy as np

from keras_gradtools import validation
from keras_gradtools.annotations import Matrix
from keras_gradtools.curvature.estimators.estimate import Estimate
from keras_gradtools.curvature.estimators.krylov_basis import KrylovBasis, dot, require_finite_length
from keras_gradtools.curvature.operators.matrix_arguments import matvec_of, precision_of, progress_of, square_matrix
from keras_gradtools.curvature.solvers.arguments import require_matvecs

METHODS = ("hutch++", "hutchinson")


def trace(
    a: Matrix, matvecs: int = 99, method: Literal["hutch++", "hutchinson"] = "hutch++", seed: int = 0
) -> Estimate:
    r"""An estimate of the trace from products with vectors $v_i$ of random signs.

    Hutchinson's estimator is the mean of $v_i^\top A v_i$. Hutch++ uses a third of the products to find the directions
    $Q$ of the largest eigenvalues, computes the trace exactly on these, and samples the rest:
    $\operatorname{tr}(Q^\top A Q) + \overline{v_i^\top (I - QQ^\top) A (I - QQ^\top) v_i}$. It is more accurate if a
    few eigenvalues are far larger than the others, as in trained models.

    Args:
        a: A square matrix of shape `(n, n)`, which need not be symmetric: a curvature operator, an expression of
            operators such as `2 * h + g` or `h @ g`, an array or a tensor, a sparse matrix or a `LinearOperator` of
            SciPy, or any object with `shape` and `a @ v`.
        matvecs: Number of products, 4 or more for `"hutch++"` and 2 or more for `"hutchinson"`. If it is `n` or more,
            the trace is computed exactly with `n` products.
        method: `"hutch++"` or `"hutchinson"`.
        seed: An integer that seeds the random vectors.

    Returns:
        An `Estimate` of the trace, with the standard error of the mean over the samples.

    Raises:
        ValueError: If the matrix or an option is invalid.
        FloatingPointError: If a product is not finite.

    Cost:
        `matvecs` products, and for Hutch++ memory for a third as many vectors.

    Example:

    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> kg.curvature.trace(np.diag([1.0, 2.0, 3.0]))  # computed exactly, with 3 products
    Estimate(value=6.0, standard_error=0.0)

    Source: Hutchinson, "A stochastic estimator of the trace of the influence matrix" (1989); Meyer, Musco, Musco &
    Woodruff, "Hutch++" (arXiv:2010.09649, 2020), algorithm 1.
    """
    a = square_matrix("trace", a)
    validation.require_seed("trace", seed)
    validation.require_choice("trace", "method", method, METHODS)
    least = 4 if method == "hutch++" else 2
    matvecs = require_matvecs("trace", matvecs, least)
    n, matvec = a.shape[0], finite_matvec_of(a)
    with progress_of(a, "trace", min(matvecs, n)) as bar:
        if matvecs >= n:
            return Estimate(float(sum(bar.after(matvec(unit))[i] for i, unit in enumerate(units(n)))), 0.0)
        generator = np.random.default_rng(seed)
        if method == "hutchinson":
            samples = []
            for _ in range(matvecs):
                v = random_signs(generator, n)
                samples.append(dot(v, bar.after(matvec(v))))
            return mean_of(samples)
        return _hutch_plus_plus(matvec, n, matvecs, generator, precision_of(a), bar)


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


def finite_matvec_of(a):
    """`matvec_of(a)`, which raises `FloatingPointError` for a product that is not finite."""
    matvec = matvec_of(a)

    def finite(vector):
        product = matvec(vector)
        require_finite_length(product)
        return product

    return finite


def mean_of(samples):
    """The mean of samples along axis 0, and its standard error. A sample is a number or an array."""
    samples = np.asarray(samples, "float64")
    error = samples.std(axis=0, ddof=1) / len(samples) ** 0.5
    if samples.ndim == 1:
        return Estimate(float(samples.mean()), float(error))
    return Estimate(samples.mean(axis=0), error)


def random_signs(generator, n):
    """A vector of independent random signs, which give these estimates a lower variance than normal numbers."""
    return (2.0 * generator.integers(0, 2, n, dtype="int8") - 1.0).astype("float32")


def units(n):
    """Yields the unit vectors, each time in the same array."""
    unit = np.zeros(n, "float32")
    for i in range(n):
        unit[i] = 1.0
        yield unit
        unit[i] = 0.0
