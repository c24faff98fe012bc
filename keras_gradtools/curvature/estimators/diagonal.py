"""The diagonal of a matrix from products with random vectors."""

import numpy as np

from keras_gradtools import validation
from keras_gradtools.annotations import Matrix
from keras_gradtools.curvature.estimators.estimate import Estimate
from keras_gradtools.curvature.estimators.trace import finite_matvec_of, random_signs, units
from keras_gradtools.curvature.operators.matrix_arguments import progress_of, square_matrix
from keras_gradtools.curvature.solvers.arguments import require_matvecs


def diagonal(a: Matrix, matvecs: int = 99, seed: int = 0) -> Estimate:
    r"""An estimate of the diagonal, the mean of $v_i \odot A v_i$ over vectors $v_i$ of random signs.

    Args:
        a: A square matrix of shape `(n, n)`, as for `kg.curvature.trace`.
        matvecs: Number of products, 2 or more. If it is `n` or more, the diagonal is computed exactly with `n`
            products.
        seed: An integer that seeds the random vectors.

    Returns:
        An `Estimate` with arrays of shape `(n,)` in double precision: the diagonal, and the standard error of each of
        its elements.

    Raises:
        ValueError: If the matrix or an option is invalid.
        FloatingPointError: If a product is not finite.

    Cost:
        `matvecs` products. The standard error of an element is the norm of the other elements in its row, divided by
        the square root of `matvecs`.

    Example:

    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> kg.curvature.diagonal(np.array([[2.0, 1.0], [1.0, 3.0]])).value  # computed exactly, with 2 products
    array([2., 3.])

    Source: Bekas, Kokiopoulou & Saad, "An estimator for the diagonal of a matrix" (2007), equation 2.
    """
    a = square_matrix("diagonal", a)
    validation.require_seed("diagonal", seed)
    matvecs = require_matvecs("diagonal", matvecs, 2)
    n, matvec = a.shape[0], finite_matvec_of(a)
    with progress_of(a, "diagonal", min(matvecs, n)) as bar:
        if matvecs >= n:
            exact = np.array([bar.after(matvec(unit))[i] for i, unit in enumerate(units(n))], "float64")
            return Estimate(exact, np.zeros(n))
        generator = np.random.default_rng(seed)
        # Welford's algorithm, since storing all samples would take memory for `matvecs` vectors.
        mean, squares = np.zeros(n), np.zeros(n)
        for count in range(1, matvecs + 1):
            v = random_signs(generator, n)
            sample = v * np.asarray(bar.after(matvec(v)), "float64")
            change = sample - mean
            mean += change / count
            squares += change * (sample - mean)
        return Estimate(mean, np.sqrt(squares / (matvecs - 1) / matvecs))
