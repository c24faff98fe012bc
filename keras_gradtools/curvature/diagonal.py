"""The diagonal of a symmetric matrix from products with random vectors."""

import numpy as np

from keras_gradtools import validation
from keras_gradtools.curvature.estimate import Estimate
from keras_gradtools.curvature.trace import checked_budget, random_signs, units


def estimate_diagonal(matvec, n, matvecs, seed, progress):
    """The diagonal by the estimator of Bekas et al.: see `CurvatureOperator.diagonal`."""
    validation.require_seed("diagonal", seed)
    matvecs = checked_budget("diagonal", matvecs, 2)
    with progress(min(matvecs, n)) as bar:
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
