"""The trace and the diagonal from random products: unbiased, with errors that hold, and within their budget."""

import contextlib

import numpy as np
import pytest

import keras_gradtools as kg
from tests.curvature.test_eigenvalues import Known, symmetric, trained_hessian

METHODS = ["hutch++", "hutchinson"]
N = 90
MATRICES = {
    "random": symmetric(np.random.default_rng(1).normal(size=N)),
    "decaying": symmetric(1 / np.arange(1, N + 1) ** 2, seed=1),
    "indefinite": symmetric((-1.0) ** np.arange(N) * np.linspace(1, 20, N), seed=2),
    "not random": np.fromfunction(lambda i, j: 1.0 / (1 + i + j) + (i == j), (N, N)),
}
SEEDS = range(100)


class Counted(Known):
    """A matrix that counts its products, and the progress that it is told."""

    def __init__(self, a, dtype="float64"):
        super().__init__(len(a), a.__matmul__, dtype)
        self.products, self.updates, self.total = 0, 0, None

    def __matmul__(self, v):
        assert v.shape == self.shape[:1]
        self.products += 1
        return super().__matmul__(v)

    @contextlib.contextmanager
    def _progress(self, what, total, unit="product"):
        self.total = total
        yield self

    def after(self, result):
        self.updates += 1
        return result


def trace(a, matvecs, method="hutch++", seed=0, dtype="float64"):
    return kg.curvature.trace(a if isinstance(a, Counted) else Counted(a, dtype), matvecs, method, seed)


def diagonal(a, matvecs, seed=0):
    return kg.curvature.diagonal(a if isinstance(a, Counted) else Counted(a), matvecs, seed)


def many(estimate, *args):
    """The values and the errors of many seeds."""
    found = [estimate(*args, seed=seed) for seed in SEEDS]
    return np.array([e.value for e in found]), np.array([e.standard_error for e in found])


class TestTrace:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("name", MATRICES)
    def test_is_unbiased_and_knows_its_error(self, name, method):
        a = MATRICES[name]
        truth = np.trace(a)
        values, errors = many(trace, a, 60, method)
        assert abs(values.mean() - truth) < 4 * values.std() / len(values) ** 0.5
        assert (np.abs(values - truth) <= 2 * errors).sum() >= 90
        # The square of the error is the variance, on average.
        assert 0.6 < (errors**2).mean() / values.var() < 1.6

    @pytest.mark.parametrize("matvecs", [4, 5])
    def test_hutch_plus_plus_is_unbiased_with_the_fewest_products(self, matvecs):
        a = MATRICES["random"]
        values, errors = many(trace, a, matvecs, "hutch++")
        assert abs(values.mean() - np.trace(a)) < 4 * values.std() / len(values) ** 0.5
        assert 0.4 < (errors**2).mean() / values.var() < 2.5

    @pytest.mark.parametrize("name", MATRICES)
    def test_the_variance_of_hutchinson_is_the_known_one(self, name):
        a, matvecs = MATRICES[name], 25
        variance = 2 * (a**2).sum() - 2 * (np.diag(a) ** 2).sum()
        _, errors = many(trace, a, matvecs, "hutchinson")
        np.testing.assert_allclose((errors**2).mean(), variance / matvecs, rtol=0.15)

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_hutch_plus_plus_is_closer_where_the_spectrum_decays(self, dtype):
        a = symmetric(0.9 ** np.arange(200), dtype)
        rms = {m: np.sqrt(np.mean([(trace(a, 99, m, s, dtype).value - 10) ** 2 for s in range(20)])) for m in METHODS}
        assert 3 * rms["hutch++"] < rms["hutchinson"]

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("n, matvecs", [(1, 6), (6, 6), (17, 17), (17, 18), (17, 1000)])
    def test_enough_products_are_exact(self, method, n, matvecs):
        a = symmetric(np.random.default_rng(n).normal(size=n))
        counted = Counted(a)
        found = trace(counted, matvecs, method)
        np.testing.assert_allclose(found.value, np.trace(a), rtol=1e-13, atol=1e-13)
        assert isinstance(found.value, float) and found.standard_error == 0
        assert counted.products == counted.updates == counted.total == n

    @pytest.mark.parametrize("method", METHODS)
    def test_the_budget_is_kept(self, method):
        for a in (MATRICES["random"], symmetric(np.r_[3.0, -1.0, np.zeros(N - 2)]), np.zeros((N, N))):
            for matvecs in (*range(4, 14), 88, 89):
                counted = Counted(a)
                trace(counted, matvecs, method)
                assert counted.products == counted.updates == counted.total == matvecs

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize("spectrum", [[0.0], [5.0], [3.0, -1.0], [4.0, 3.0, 2.0, 1e-2], [1.0, -1.0, 2.0, 2.0]])
    def test_hutch_plus_plus_is_exact_for_a_low_rank(self, spectrum, dtype):
        a = symmetric(np.concatenate([spectrum, np.zeros(N - len(spectrum))]), dtype)
        rounding = 50 * np.finfo(dtype).eps * max(np.abs(spectrum))
        for matvecs in (12, 15, 40):
            found = trace(a, matvecs, dtype=dtype)
            assert abs(found.value - sum(spectrum)) <= rounding and found.standard_error <= rounding

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize("scale", [1e-28, 1e25])
    def test_squares_out_of_range(self, scale, dtype):
        a = symmetric(np.random.default_rng(1).normal(size=N), dtype)
        for method in METHODS:
            found, expected = trace(np.array(scale * a, dtype), 30, method, 0, dtype), trace(a, 30, method, 0, dtype)
            np.testing.assert_allclose(found, scale * np.array(expected), rtol=1e-3)

    @pytest.mark.parametrize("c", [2.0, -0.5])
    def test_hutchinson_is_exact_for_a_diagonal_matrix(self, c):
        a = c * np.diag(np.arange(1.0, N + 1))
        found = trace(a, 2, "hutchinson")
        np.testing.assert_allclose(found.value, np.trace(a), rtol=1e-13)
        assert found.standard_error <= 1e-13 * abs(found.value)

    @pytest.mark.parametrize("method", METHODS)
    def test_the_seed_repeats_and_leaves_the_global_one(self, method):
        before = np.random.get_state()[1].copy()
        one, again, other = (trace(MATRICES["random"], 30, method, seed) for seed in (4, 4, 5))
        np.testing.assert_array_equal(np.random.get_state()[1], before)
        assert one == again and one.value != other.value


class TestDiagonal:
    @pytest.mark.parametrize("name", MATRICES)
    def test_is_unbiased_and_knows_its_error(self, name):
        a, matvecs = MATRICES[name], 25
        truth = np.diag(a)
        values, errors = many(diagonal, a, matvecs)
        variance = ((a**2).sum(axis=1) - truth**2) / matvecs
        # Of 90 elements one is beyond three errors by chance, and none beyond five.
        assert np.all(np.abs(values.mean(axis=0) - truth) < 5 * np.sqrt(variance / len(SEEDS)))
        np.testing.assert_allclose((errors**2).mean(axis=0), variance, rtol=0.25)
        covered = (np.abs(values - truth) <= 2 * errors).mean(axis=0)
        assert covered.mean() > 0.92 and covered.min() > 0.83

    @pytest.mark.parametrize("n, matvecs", [(1, 2), (17, 17), (17, 1000)])
    def test_enough_products_are_exact(self, n, matvecs):
        a = symmetric(np.random.default_rng(n).normal(size=n))
        counted = Counted(a)
        found = diagonal(counted, matvecs)
        np.testing.assert_array_equal(found.value, np.diag(a))
        np.testing.assert_array_equal(found.standard_error, np.zeros(n))
        assert counted.products == counted.updates == counted.total == n

    @pytest.mark.parametrize("matvecs", [2, 3, 89])
    def test_the_budget_is_kept(self, matvecs):
        counted = Counted(MATRICES["random"])
        diagonal(counted, matvecs)
        assert counted.products == counted.updates == counted.total == matvecs

    def test_each_element_has_its_own_error(self):
        # The second block is diagonal: there a single product is exact.
        a = np.zeros((N, N))
        a[:20, :20] = MATRICES["random"][:20, :20]
        a[range(20, N), range(20, N)] = np.linspace(-1, 1, N - 20)
        found = diagonal(a, 10)
        np.testing.assert_allclose(found.value[20:], np.diag(a)[20:], atol=1e-15)
        np.testing.assert_allclose(found.standard_error[20:], np.zeros(N - 20), atol=1e-15)
        assert found.standard_error[:20].min() > 0

    def test_are_the_mean_and_the_error_of_the_samples(self):
        a, samples = MATRICES["indefinite"], []

        def matvec(v):
            np.testing.assert_array_equal(np.abs(v), np.ones(N))
            samples.append(v * (a @ v))
            return a @ v

        found = kg.curvature.diagonal(Known(N, matvec), 12, 3)
        np.testing.assert_allclose(found.value, np.mean(samples, axis=0), rtol=1e-10)
        np.testing.assert_allclose(found.standard_error, np.std(samples, axis=0, ddof=1) / 12**0.5, rtol=1e-10)

    def test_the_seed_repeats_and_leaves_the_global_one(self):
        before = np.random.get_state()[1].copy()
        one, again, other = (diagonal(MATRICES["random"], 30, seed) for seed in (4, 4, 5))
        np.testing.assert_array_equal(np.random.get_state()[1], before)
        np.testing.assert_array_equal(one, again)
        assert np.abs(one.value - other.value).min() > 0


class TestErrors:
    @pytest.mark.parametrize("matvecs", [3, 0, -3, 6.0, 6.5, True, "99", None, np.inf, np.nan])
    def test_budgets_that_do_not_fit(self, matvecs):
        with pytest.raises(ValueError, match="^trace expects an integer of 4 or more as `matvecs`.*Received: matvecs="):
            trace(MATRICES["random"], matvecs)

    @pytest.mark.parametrize("matvecs", [1, 2.5, np.inf, np.nan])
    def test_others_need_two_samples(self, matvecs):
        with pytest.raises(ValueError, match="^trace expects an integer of 2 or more as `matvecs`"):
            trace(MATRICES["random"], matvecs, "hutchinson")
        with pytest.raises(ValueError, match="^diagonal expects an integer of 2 or more as `matvecs`"):
            diagonal(MATRICES["random"], matvecs)

    def test_the_least_budgets_and_other_integers_do(self):
        a = MATRICES["random"]
        assert trace(a, np.int64(6)) == trace(a, 6)
        assert np.isfinite(trace(a, 2, "hutchinson").standard_error)
        np.testing.assert_array_equal(diagonal(a, np.int32(2)), diagonal(a, 2))

    @pytest.mark.parametrize("method", ["hutch", "Hutch++", None])
    def test_methods(self, method):
        with pytest.raises(ValueError, match="^trace expects 'hutch\\+\\+' or 'hutchinson' as `method`. Received: "):
            trace(MATRICES["random"], 30, method)


class TestOfATrainedClassifier:
    def test_against_the_dense_matrix(self):
        hessian = trained_hessian()
        weights = hessian.model.get_weights()
        dense = hessian.dense().astype("float64")
        n = len(dense)
        exact = hessian.trace(n)
        np.testing.assert_allclose(exact.value, np.trace(dense), rtol=1e-4)
        assert exact.standard_error == 0
        np.testing.assert_allclose(hessian.diagonal(n).value, np.diag(dense), atol=1e-5 * np.abs(dense).max())
        for method in METHODS:
            found = hessian.trace(30, method, seed=1)
            assert 0 < abs(found.value - np.trace(dense)) < 4 * found.standard_error
        found = hessian.diagonal(30, seed=1)
        assert np.all(np.abs(found.value - np.diag(dense)) <= 5 * found.standard_error + 1e-6)
        for before, after in zip(weights, hessian.model.get_weights(), strict=True):
            np.testing.assert_array_equal(after, before)

    def test_options(self):
        hessian = trained_hessian()
        one, other = hessian.trace(9), hessian.trace(9, seed=1)
        assert one.value == pytest.approx(hessian.trace(9, "hutch++", 0).value, rel=1e-5)
        assert one.value != pytest.approx(other.value, rel=1e-5)
        with pytest.raises(ValueError, match="trace expects an integer of 4 or more"):
            hessian.trace(3)
