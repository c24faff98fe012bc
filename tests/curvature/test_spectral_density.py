"""The density of eigenvalues against known spectra: its integral, its moments and its shape."""

import re

import numpy as np
import pytest

from keras_gradtools.curvature import spectral_density
from tests.curvature.test_eigenvalues import Counted, Known, symmetric, trained_hessian

DTYPES = ["float32", "float64"]


def density(a, probes=10, steps=20, **options):
    return spectral_density(a, probes, steps, **options)


def integral(found):
    steps = np.diff(found.grid)
    assert np.all(steps > 0)
    return (steps * (found.density[1:] + found.density[:-1])).sum() / 2


def smoothed(grid, values, width):
    """Gaussians of the same weight around each of some values."""
    peaks = np.exp(-0.5 * ((grid[:, None] - values) / width) ** 2) / (width * np.sqrt(2 * np.pi))
    return peaks.mean(axis=1)


SPECTRA = {
    "random": np.random.default_rng(1).normal(size=40),
    "a spike": np.concatenate([np.linspace(0, 1, 39), [50.0]]),
    "low rank": np.concatenate([[-2.0, 3.0, 7.0], np.zeros(37)]),
    "two values": np.repeat([-1.0, 4.0], 20),
    "identity": np.ones(40),
    "zero": np.zeros(40),
    "one element": np.array([-3.0]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECTRA)
class TestForAnySpectrum:
    @pytest.mark.parametrize("width", [None, 1e-3, 0.5])
    @pytest.mark.parametrize("points", [2, 5, 100, 1000])
    def test_integrates_to_one(self, name, dtype, points, width):
        found = density(symmetric(SPECTRA[name], dtype), points=points, width=width)
        assert found.grid.shape == found.density.shape == found.standard_error.shape == (points,)
        assert np.isfinite(found.density).all() and np.all(found.density >= 0) and np.all(found.standard_error >= 0)
        assert abs(integral(found) - 1) < 1e-6
        assert found.width > 0 and (width is None or found.width == width)

    @pytest.mark.parametrize("steps", [1, 2, 6])
    def test_the_quadrature_is_exact_for_polynomials(self, name, dtype, steps):
        # Gauss: with m nodes, v'p(A)v is exact for polynomials up to degree 2m - 1.
        a = symmetric(SPECTRA[name], dtype)
        seen = []

        def matvec(v):
            seen.append(v.astype("float64"))
            return a @ v

        found = density(Known(len(a), matvec, dtype), 3, steps, points=10)
        taken = (~np.isnan(found.nodes)).sum(axis=1)
        firsts = [seen[start] for start in np.cumsum(taken) - taken]
        tolerance = (1e-4 if dtype == "float32" else 1e-11) * np.abs(SPECTRA[name]).max()
        for v, nodes, weights in zip(firsts, found.nodes, found.weights, strict=True):
            assert abs(weights.sum() - 1) < 1e-12
            nodes, weights = nodes[~np.isnan(nodes)], weights[~np.isnan(nodes)]
            u = v / np.linalg.norm(v)
            for degree in range(1, min(2 * steps, 4)):
                u = a.astype("float64") @ u
                expected = u @ v / np.linalg.norm(v)
                scale = np.abs(SPECTRA[name]).max() ** (degree - 1)
                assert abs(weights @ nodes**degree - expected) <= tolerance * scale + 1e-30

    def test_the_first_moments_are_those_of_the_spectrum(self, name, dtype):
        values = SPECTRA[name]
        found = density(symmetric(values, dtype), probes=60, steps=5)
        for degree in (1, 2):
            of_each = np.nansum(found.weights * np.nan_to_num(found.nodes) ** degree, axis=1)
            error = of_each.std(ddof=1) / 60**0.5 + 1e-5 * np.abs(values).max() ** degree
            assert abs(of_each.mean() - (values**degree).mean()) <= 3.5 * error

    def test_the_density_is_that_of_its_nodes(self, name, dtype):
        found = density(symmetric(SPECTRA[name], dtype), probes=4, steps=6, width=0.3)
        of_each = [
            (w[w > 0] * np.exp(-0.5 * ((found.grid[:, None] - t[w > 0]) / 0.3) ** 2)).sum(axis=1)
            / (0.3 * np.sqrt(2 * np.pi))
            for t, w in zip(found.nodes, found.weights, strict=True)
        ]
        np.testing.assert_allclose(found.density, np.mean(of_each, axis=0), atol=1e-5)
        np.testing.assert_allclose(found.standard_error, np.std(of_each, axis=0, ddof=1) / 2, atol=1e-5)
        nodes = found.nodes[~np.isnan(found.nodes)]
        np.testing.assert_allclose(found.grid[[0, -1]], [nodes.min() - 1.5, nodes.max() + 1.5], atol=1e-6)


class TestAgainstKnownDensities:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("name", ["random", "a spike", "low rank", "two values"])
    def test_enough_steps_find_each_eigenvalue(self, name, dtype):
        values = SPECTRA[name]
        width = 0.05 * np.ptp(values)
        found = density(symmetric(values, dtype), probes=60, steps=40, width=width)
        # Distances of nodes of weight to the nearest eigenvalue.
        nodes = found.nodes[found.weights > 1e-6]
        distance = np.abs(nodes[:, None] - values).min(axis=1)
        assert distance.max() < (1e-4 if dtype == "float32" else 1e-10) * np.abs(values).max()
        off = np.abs(found.density - smoothed(found.grid, values, width))
        assert np.all(off <= 4.5 * found.standard_error + 1e-6)

    def test_fewer_steps_find_the_shape_of_a_large_one(self):
        values = np.concatenate([np.linspace(0, 1, 270), np.linspace(3, 4, 30)])
        found = density(symmetric(values), probes=20, steps=40, width=0.1)
        exact = smoothed(found.grid, values, 0.1)
        assert np.all(np.abs(found.density - exact) < 0.1 * exact.max())
        share = found.density[found.grid > 2].sum() / found.density.sum()
        assert abs(share - 0.1) < 0.02

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("value", [1.0, 3.0, -0.1, 0.0, 1e-12])
    def test_a_multiple_of_the_identity_is_one_peak(self, value, dtype):
        # The width is to be a hundredth of the only scale that there is, and not of rounding.
        a = value * np.eye(40, dtype=dtype)
        found = density(a, points=400)
        assert np.isclose(found.width, 0.01 * (abs(value) or 1.0), rtol=1e-3)
        exact = smoothed(found.grid, np.array([value]), found.width)
        np.testing.assert_allclose(found.density, exact, atol=1e-3 * exact.max())

    def test_the_width_is_a_hundredth_of_the_range(self):
        found = density(np.diag(np.linspace(-1.0, 4.0, 30)), steps=30)
        assert np.isclose(found.width, 0.05, rtol=1e-6)
        np.testing.assert_allclose(found.grid, np.linspace(-1.25, 4.25, 1000), atol=1e-6)


class TestProducts:
    @pytest.mark.parametrize("probes, steps, n, each", [(2, 1, 20, 1), (3, 7, 20, 7), (4, 50, 20, 20)])
    def test_as_many_as_asked_for(self, probes, steps, n, each):
        counted = Counted(symmetric(np.linspace(-1, 1, n)))
        found = density(counted, probes, steps)
        assert counted.count == probes * each
        assert found.nodes.shape == found.weights.shape == (probes, each)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_fewer_where_the_space_ends(self, dtype):
        counted = Counted(np.diag(np.repeat([-2.0, 1.0, 5.0], 8)).astype(dtype))
        found = density(counted, 4, 20)
        assert counted.count == 4 * 3
        np.testing.assert_allclose(found.nodes[:, :3], np.tile([-2.0, 1.0, 5.0], (4, 1)), atol=1e-5)
        assert np.isnan(found.nodes[:, 3:]).all() and np.all(found.weights[:, 3:] == 0)

    def test_the_seed_repeats_and_leaves_the_global_one(self):
        a = symmetric(SPECTRA["random"])
        before = np.random.get_state()[1].copy()
        one, again, other = (density(a, seed=seed) for seed in (4, 4, 5))
        np.testing.assert_array_equal(np.random.get_state()[1], before)
        np.testing.assert_array_equal(one.density, again.density)
        assert np.abs(one.density - other.density).max() > 0
        # Each probe is another one.
        assert len(np.unique(one.weights[:, 0])) == 10


class TestExtremes:
    @pytest.mark.parametrize("scale", [1e-28, 1e-12, 1e12, 1e20, 1e30])
    def test_single_precision(self, scale):
        a = symmetric(SPECTRA["random"])
        found, expected = density((scale * a).astype("float32"), steps=10), density(a.astype("float32"), steps=10)
        np.testing.assert_allclose(found.nodes, scale * expected.nodes, rtol=0, atol=scale * 1e-3)
        np.testing.assert_allclose(found.density * scale, expected.density, atol=0.05 * expected.density.max())

    def test_a_grid_far_coarser_than_the_peaks(self):
        # Between two points of the grid, the peaks there are as small as numbers get, or 0.
        a = np.diag([0.0, 0.5, 1.0])
        for width in np.geomspace(1e-3, 1e-1, 100):
            assert abs(integral(density(a, 2, 3, points=2, width=width)) - 1) < 1e-6

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_products_that_are_not_finite(self, bad):
        with pytest.raises(FloatingPointError, match="not finite"):
            density(np.diag([1.0, 2.0, bad]), 2, 3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"probes": 1}, "an integer of 2 or more as `probes`. Received: probes=1"),
        ({"probes": 2.0}, "as `probes`. Received: probes=2.0"),
        ({"probes": True}, "as `probes`. Received: probes=True"),
        ({"steps": 0}, "a positive integer as `steps`. Received: steps=0"),
        ({"steps": "50"}, "as `steps`. Received: steps='50'"),
        ({"points": 1}, "an integer of 2 or more as `points`. Received: points=1"),
        ({"points": None}, "as `points`. Received: points=None"),
        ({"width": 0}, "a positive number, or None, as `width`. Received: width=0"),
        ({"width": -0.1}, "Received: width=-0.1"),
        ({"width": np.nan}, "Received: width=nan"),
        ({"width": np.inf}, "Received: width=inf"),
        ({"width": "wide"}, "Received: width='wide'"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match="^spectral_density expects .*" + re.escape(message)):
        density(np.eye(5), **options)


def test_of_a_trained_classifier():
    hessian = trained_hessian()
    weights = hessian.model.get_weights()
    values = np.linalg.eigvalsh(hessian.dense().astype("float64"))
    found = hessian.spectral_density(probes=5, steps=20, points=500, width=0.03 * np.ptp(values))
    assert abs(integral(found) - 1) < 1e-6
    assert abs(np.nanmax(found.nodes) - values[-1]) < 1e-3 * values[-1]
    assert abs(np.nanmin(found.nodes) - values[0]) < 1e-2 * values[-1]
    exact = smoothed(found.grid, values, found.width)
    assert np.all(np.abs(found.density - exact) <= 5 * found.standard_error + 0.02 * exact.max())
    for before, after in zip(weights, hessian.model.get_weights(), strict=True):
        np.testing.assert_array_equal(after, before)
