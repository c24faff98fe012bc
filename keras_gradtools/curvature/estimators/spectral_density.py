"""The density of the eigenvalues of a symmetric matrix, by stochastic Lanczos quadrature."""

from typing import Any, NamedTuple

import numpy as np

from keras_gradtools import validation
from keras_gradtools.annotations import Matrix
from keras_gradtools.curvature.estimators.krylov_basis import KrylovBasis, require_finite_length
from keras_gradtools.curvature.estimators.trace import mean_of
from keras_gradtools.curvature.operators.matrix_arguments import matvec_of, precision_of, progress_of, symmetric_matrix
from keras_gradtools.display.results import displayed

# The default width of a peak, relative to the range of the eigenvalues. The grid extends `_MARGIN` widths beyond that
# range.
_RELATIVE_WIDTH = 0.01
_MARGIN = 5.0


@displayed
class SpectralDensity(NamedTuple):
    """A density of eigenvalues, which integrates to 1.

    Attributes:
        grid: Equidistant eigenvalues, of shape `(points,)`.
        density: The density on the grid, per unit of eigenvalue, of shape `(points,)`.
        standard_error: The standard error of the density over the probes, of shape `(points,)`.
        nodes: The nodes of the quadrature, of shape `(probes, steps)`, padded with NaN if fewer steps were enough.
        weights: The weights of the nodes, which sum to 1 for each probe, padded with zeros.
        width: The standard deviation of the Gaussian that represents each eigenvalue.
    """

    grid: Any
    density: Any
    standard_error: Any
    nodes: Any
    weights: Any
    width: float


def spectral_density(
    a: Matrix, probes: int = 10, steps: int = 50, *, points: int = 1000, width: float | None = None, seed: int = 0
) -> SpectralDensity:
    r"""An estimate of the density of the eigenvalues, $\frac1n \sum_i \mathcal{N}(t; \lambda_i, \sigma^2)$.

    $\mathcal{N}$ is a Gaussian with mean $\lambda_i$ and variance $\sigma^2$. The eigenvalues are not computed. Each
    probe runs the Lanczos method from a random vector, which gives nodes and weights of a Gauss quadrature of the
    density.

    Args:
        a: A symmetric matrix of shape `(n, n)`, as for `kg.curvature.eigsh`.
        probes: Number of random vectors, 2 or more.
        steps: Number of Lanczos steps, and of products, for each probe.
        points: Number of points in the grid on which the density is returned.
        width: $\sigma$. Default: a hundredth of the range of the eigenvalues, or of their magnitude if all are equal.
        seed: An integer that seeds the random vectors.

    Returns:
        A `SpectralDensity`: the grid, the density, which integrates to 1 on it, its standard error over the probes, and
        the nodes and weights. `kg.plots.plot_spectral_density` draws it.

    Raises:
        FloatingPointError: If a product is not finite.
        ValueError: If the matrix is not symmetric, or an option is invalid.

    Cost:
        `probes * steps` products, and memory for `steps` vectors.

    Example:

    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> density = kg.curvature.spectral_density(np.diag([0.0, 0.0, 0.0, 1.0]), probes=2)
    >>> np.sort(density.nodes).round(6) + 0.0  # the eigenvalues, in two steps for each probe
    array([[ 0.,  1., nan, nan],
           [ 0.,  1., nan, nan]])

    Source: Ghorbani, Krishnan & Xiao, "An investigation into neural net optimization via Hessian eigenvalue density"
    (arXiv:1901.10159, 2019), section 2.
    """
    a = symmetric_matrix("spectral_density", a)
    for name, given, least in (("probes", probes, 2), ("steps", steps, 1), ("points", points, 2)):
        validation.require_count("spectral_density", name, given, least)
    validation.require_seed("spectral_density", seed)
    validation.require_number("spectral_density", "width", width, above=0, may_be_none=True)
    n, dtype, matvec = a.shape[0], precision_of(a), matvec_of(a)
    steps = min(steps, n)
    generator = np.random.default_rng(seed)
    nodes, weights = np.full((probes, steps), np.nan), np.zeros((probes, steps))
    with progress_of(a, "spectral_density", probes * steps) as bar:
        for i in range(probes):
            values, vectors = np.linalg.eigh(_tridiagonal(matvec, n, steps, generator, dtype, bar))
            nodes[i, : len(values)], weights[i, : len(values)] = values, vectors[0] ** 2
    low, high = np.nanmin(nodes), np.nanmax(nodes)
    if width is None:
        value_range, scale = high - low, max(abs(high), abs(low))
        # A multiple of the identity has a single eigenvalue, so its magnitude replaces the range.
        width = _RELATIVE_WIDTH * (value_range if value_range > 100 * np.finfo(dtype).eps * scale else scale or 1.0)
    grid = np.linspace(low - _MARGIN * width, high + _MARGIN * width, points)
    of_each = np.stack([_smoothed(grid, t, w, width) for t, w in zip(nodes, weights, strict=True)])
    density, error = mean_of(of_each)
    return SpectralDensity(grid, density, error, nodes, weights, float(width))


def _tridiagonal(matvec, n, steps, generator, dtype, bar):
    basis = KrylovBasis(steps, n, dtype)
    basis.append_random(generator)
    projected = np.zeros((steps, steps))
    for j in range(steps):
        product = np.array(matvec(basis[j]), dtype=dtype)
        length = require_finite_length(product)
        parts, remainder = basis.orthogonalize(product)
        bar.update()
        projected[j, j] = parts[j]
        if j + 1 == steps:
            break
        if remainder <= 10 * np.finfo(dtype).eps * length:
            return projected[: j + 1, : j + 1]
        projected[j, j + 1] = projected[j + 1, j] = remainder
        basis.append(product, remainder)
    return projected


def _smoothed(grid, nodes, weights, width):
    """A sum of Gaussians. Each one integrates to its weight on this grid, even if the grid is coarse."""
    positive = weights > 0
    exponents = 0.5 * ((grid - nodes[positive, None]) / width) ** 2
    # Relative to the nearest grid point, so that no narrow peak is lost between two points.
    peaks = np.exp(exponents.min(axis=1, keepdims=True) - exponents)
    spacing = grid[1] - grid[0]
    totals = spacing * (peaks.sum(axis=1) - 0.5 * (peaks[:, 0] + peaks[:, -1]))  # the trapezoidal rule
    return (weights[positive] / totals) @ peaks
