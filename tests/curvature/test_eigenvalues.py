"""Eigenvalues by thick-restart Lanczos against `eigh` and SciPy, on known spectra and on a trained classifier."""

import functools
import re
import tracemalloc

import keras
import numpy as np
import pytest
from keras import layers
from scipy.sparse import linalg as sparse
from sklearn.datasets import load_digits

import keras_gradtools as kg
from keras_gradtools.curvature import eigsh
from keras_gradtools.curvature.estimators import eigenvalues, krylov_basis

RNG = np.random.default_rng(0)
WHICH = ["LA", "SA", "LM", "BE"]
DTYPES = ["float32", "float64"]
# Of the largest eigenvalue: what an eigenvalue and a residual may be off by.
ATOL = {"float32": 5e-5, "float64": 1e-9}


def symmetric(spectrum, dtype="float64", seed=0):
    """A matrix with these eigenvalues and random eigenvectors."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(spectrum), len(spectrum))))
    a = (q * spectrum) @ q.T
    return ((a + a.T) / 2).astype(dtype)


@functools.cache
def trained_hessian():
    """That of a small classifier of digits, after some training: 56 weights, a few large eigenvalues, both signs."""
    images, y = load_digits(n_class=4, return_X_y=True)
    x, y = (images[:64].reshape(-1, 8, 8).mean(axis=1) / 8).astype("float32"), y[:64]
    model = keras.Sequential([keras.Input((8,)), layers.Dense(4, activation="tanh"), layers.Dense(4)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.02), loss)
    model.fit(x, y, batch_size=32, epochs=20, verbose=0)
    return kg.curvature.Hessian(model, loss, (x, y), verbose=0)


class Known:
    """A matrix of which only the shape, the dtype and the products with vectors are known."""

    def __init__(self, n, matvec, dtype="float64"):
        self.shape, self.dtype, self._matvec = (n, n), np.dtype(dtype), matvec

    def __matmul__(self, v):
        return self._matvec(v)


class Counted(Known):
    """A matrix that counts its products."""

    def __init__(self, a):
        super().__init__(len(a), a.__matmul__, a.dtype)
        self.a, self.count = a, 0

    def __matmul__(self, v):
        self.count += 1
        return super().__matmul__(v)


def wanted(values, k, which):
    """Which of ascending values SciPy returns, ascending."""
    n = len(values)
    if which == "LA":
        return values[n - k :]
    if which == "SA":
        return values[:k]
    if which == "LM":
        return np.sort(values[np.argsort(np.abs(values))[n - k :]])
    return np.concatenate([values[: k // 2], values[n - (k - k // 2) :]])


def check(a, found, k, which="LA", atol=None):
    """Asserts eigenvalues as `eigh` has them, and eigenvectors of them that are orthonormal."""
    values, vectors = found
    exact = np.linalg.eigvalsh(a.astype("float64"))
    scale = np.abs(exact).max()
    atol = ATOL[a.dtype.name] * scale if atol is None else atol
    assert values.dtype == vectors.dtype == a.dtype
    assert values.shape == (k,) and vectors.shape == (len(a), k)
    np.testing.assert_allclose(values, wanted(exact, k, which), rtol=0, atol=atol)
    assert np.all(np.diff(values) >= 0)
    vectors = vectors.astype("float64")
    # Hundreds of restarts, each of which combines vectors, leave a little rounding.
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(k), atol=100 * np.finfo(a.dtype).eps)
    assert np.linalg.norm(a.astype("float64") @ vectors - vectors * values, axis=0).max() <= max(atol, 1e-300)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", WHICH)
class TestAgainstEigh:
    def test_every_k_of_a_small_matrix(self, which, dtype):
        a = symmetric(RNG.normal(size=9), dtype)
        for k in range(1, 10):
            check(a, eigsh(a, k, which), k, which)

    @pytest.mark.parametrize("k", [1, 7, 31, 63, 64])
    def test_some_of_a_larger_matrix(self, which, dtype, k):
        a = symmetric(RNG.normal(size=64), dtype)
        check(a, eigsh(a, k, which), k, which)

    @pytest.mark.parametrize("k", [3, 6])
    def test_as_scipy(self, which, dtype, k):
        # Eigenvalues far enough from each other, and from each other's negatives, for vectors to be compared.
        a = symmetric(np.linspace(-3, 4, 60) ** 3, dtype)
        values, vectors = eigsh(a, k, which)
        expected, theirs = sparse.eigsh(a.astype("float64"), k, which=which)
        np.testing.assert_allclose(values, expected, rtol=0, atol=64 * ATOL[dtype])
        # A vector is known up to its sign.
        similarity = np.abs((vectors * theirs).sum(axis=0))
        np.testing.assert_allclose(similarity, np.ones(k), atol=1e-4 if dtype == "float32" else 1e-9)

    @pytest.mark.parametrize("k, ncv", [(2, 8), (1, 2), (4, 5), (3, 400)])
    def test_the_smallest_bases(self, which, dtype, k, ncv):
        # 0.5 to 3 and their negatives: the ends are far from the rest, by different distances.
        spectrum = np.concatenate([RNG.uniform(-0.4, 0.4, 142), [-3.0, -2.0, -1.2, -0.8, 0.9, 1.4, 2.3, 3.5]])
        a = symmetric(spectrum, dtype)
        check(a, eigsh(a, k, which, ncv=ncv, max_restarts=1000), k, which)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", WHICH)
def test_many_restarts_of_a_small_basis(which, dtype):
    n, k, ncv = 500, 2, 8
    # The ends are apart from the rest by a hundredth of the range.
    a = symmetric(np.concatenate([[-1.05, -1.02], np.linspace(-1, 1, n - 4), [1.03, 1.06]]), dtype)
    counted = Counted(a)
    check(a, eigsh(counted, k, which, ncv=ncv, max_restarts=1000), k, which)
    assert counted.count > 4 * ncv


class TestMultiplicities:
    @pytest.mark.parametrize("ncv", [None, 14])
    @pytest.mark.parametrize("seed", range(4))
    def test_no_ghosts_in_single_precision(self, seed, ncv):
        # Without orthogonalization, the large ones come again from rounding as soon as they have converged.
        large = np.array([100.0, 200.0, 500.0, 1000.0])
        a = symmetric(np.concatenate([np.linspace(0, 1, 196), large]), "float32", seed)
        values, vectors = eigsh(a, 10, ncv=ncv, seed=seed, tol=1e-4, max_restarts=1000)
        np.testing.assert_allclose(values[-4:], large, rtol=1e-5)
        exact = np.linalg.eigvalsh(a.astype("float64"))[-10:-4]
        np.testing.assert_allclose(values[:6], exact, atol=1e-3)
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(10), atol=5e-6)

    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("n", [30, 100])
    def test_repeated_eigenvalues_come_as_often_as_they_are_there(self, n, seed):
        spectrum = np.concatenate(
            [np.full(3, 10.0), np.full(2, -7.0), np.random.default_rng(seed).uniform(0, 5, n - 5)]
        )
        for a in (np.diag(spectrum).astype("float32"), symmetric(spectrum, "float32", seed)):
            check(a, eigsh(a, 4, "LA", seed=seed), 4, "LA")
            check(a, eigsh(a, 6, "LM", seed=seed), 6, "LM")

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("which", WHICH)
    @pytest.mark.parametrize("k", [1, 5, 12])
    def test_few_different_eigenvalues(self, k, which, dtype):
        # The Krylov space ends after three products; the basis goes on with random vectors.
        for spectrum in ([-2.0] * 5 + [1.0] * 4 + [3.0] * 3, [-3.0] * 6 + [0.0] * 5 + [2.0]):
            a = symmetric(np.array(spectrum), dtype)
            check(a, eigsh(a, k, which), k, which)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("which", WHICH)
    def test_low_rank(self, which, dtype):
        a = symmetric(np.concatenate([[-4.0, 1.0, 2.0], np.zeros(57)]), dtype)
        check(a, eigsh(a, 3, which), 3, which)
        check(a, eigsh(a, 6, which), 6, which)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("which", WHICH)
    @pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
    @pytest.mark.parametrize("n, k", [(1, 1), (2, 1), (40, 3), (40, 40)])
    def test_multiples_of_the_identity(self, n, k, value, which, dtype):
        a = value * np.eye(n, dtype=dtype)
        check(a, eigsh(a, k, which), k, which)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_cluster(self, dtype):
        a = symmetric(np.concatenate([1 + 1e-3 * np.arange(5), RNG.uniform(0, 0.5, 195)]), dtype)
        check(a, eigsh(a, 5), 5)
        check(a, eigsh(a, 5, ncv=8, max_restarts=1000), 5)

    def test_a_product_is_not_overwritten(self):
        # The product with the identity is the vector of the basis itself.
        values, vectors = eigsh(Known(10, lambda v: v), 3)
        np.testing.assert_allclose(values, np.ones(3))
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-14)


class TestScales:
    @pytest.mark.parametrize("scale", [1e-28, 1e-12, 1e12, 1e20, 1e30])
    def test_single_precision(self, scale):
        # Squares of the numbers are out of its range, and the numbers are not.
        a = (scale * symmetric(RNG.normal(size=50))).astype("float32")
        check(a, eigsh(a, 3, "BE"), 3, "BE")

    def test_large_and_small_together(self):
        # The residuals of small eigenvalues are not below the rounding of the large ones, whatever the tolerance.
        a = symmetric(np.concatenate([[1e6], np.linspace(0, 1, 39)]), "float64")
        check(a, eigsh(a, 4), 4, atol=1e-8)
        check(a, eigsh(a, 4, "SA"), 4, "SA", atol=1e-8)


class TestMemory:
    def test_the_basis_has_the_size_it_was_given(self, monkeypatch):
        made = []

        class Watched(krylov_basis.KrylovBasis):
            def __init__(self, capacity, size, dtype):
                super().__init__(capacity, size, dtype)
                self.capacity, self.most = capacity, 0
                made.append(self)

            def append(self, w, length):
                super().append(w, length)
                self.most = max(self.most, self.count)

        monkeypatch.setattr(eigenvalues, "KrylovBasis", Watched)
        a = symmetric(RNG.uniform(size=100), "float32")
        eigsh(a, 2, ncv=8, max_restarts=1000)
        (basis,) = made
        assert basis.capacity == basis.most == 9

    def test_more_restarts_take_no_more_memory(self, monkeypatch):
        monkeypatch.setattr(krylov_basis, "_BLOCK", 1000)
        n, peaks = 20_500, []
        diagonal = np.linspace(0, 1, n, dtype="float32")
        for restarts in (1, 1, 6):
            tracemalloc.start()
            with pytest.raises(kg.curvature.EigenvalueConvergenceError):
                eigsh(Known(n, lambda v: diagonal * v, "float32"), 2, ncv=8, max_restarts=restarts)
            peaks.append(tracemalloc.get_traced_memory()[1] / (4 * n))
            tracemalloc.stop()
        # In vectors: nine of the basis, and a few for products and results.
        assert peaks[2] < peaks[1] + 0.5 and peaks[2] < 9 + 6


class TestConvergence:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("which", WHICH)
    @pytest.mark.parametrize("ncv", [9, 20])
    def test_the_error_has_the_approximations(self, ncv, which, dtype):
        a = symmetric(RNG.uniform(-1, 1, size=200), dtype)
        counted = Counted(a)
        with pytest.raises(kg.curvature.EigenvalueConvergenceError, match="did not converge") as caught:
            eigsh(counted, 4, which, ncv=ncv, max_restarts=0)
        error = caught.value
        assert isinstance(error, RuntimeError) and counted.count == ncv
        assert error.eigenvalues.shape == (4,) and np.all(np.diff(error.eigenvalues) > 0)
        v = error.eigenvectors.astype("float64")
        np.testing.assert_allclose(v.T @ v, np.eye(4), atol=20 * np.finfo(dtype).eps)
        # A Ritz value is the Rayleigh quotient of its vector, and the residuals are in their order.
        np.testing.assert_allclose((v * (a @ v)).sum(axis=0), error.eigenvalues, atol=20 * np.finfo(dtype).eps)
        residuals = np.linalg.norm(a @ v - v * error.eigenvalues, axis=0)
        np.testing.assert_allclose(error.residuals, residuals, rtol=1e-3, atol=20 * np.finfo(dtype).eps)
        number = int((residuals > np.finfo(dtype).eps ** (2 / 3) * np.abs(error.eigenvalues)).sum())
        assert str(error).startswith(f"{number} of 4 eigenvalues did not converge")
        assert "in 0 restarts" in str(error)

    def test_those_of_the_last_restart(self):
        a = symmetric(RNG.uniform(-1, 1, size=200))
        counted = Counted(a)
        with pytest.raises(kg.curvature.EigenvalueConvergenceError) as caught:
            eigsh(counted, 3, "BE", ncv=10, max_restarts=4)
        v = caught.value.eigenvectors
        # Each restart keeps 3 and half of the other 6, and takes the products of the rest.
        assert counted.count == 10 + 4 * 4
        residuals = np.linalg.norm(a @ v - v * caught.value.eigenvalues, axis=0)
        np.testing.assert_allclose(caught.value.residuals, residuals, rtol=1e-6)

    def test_a_tolerance_is_relative_to_each_eigenvalue(self):
        a = symmetric(RNG.uniform(-1, 1, size=200))
        counts = []
        for tol in (1e-2, 1e-5, 1e-10):
            counted = Counted(a)
            values, vectors = eigsh(counted, 3, tol=tol, max_restarts=1000)
            residuals = np.linalg.norm(a @ vectors - vectors * values, axis=0)
            assert np.all(residuals <= tol * np.abs(values) + 1e-14)
            counts.append(counted.count)
        assert counts[0] < counts[1] < counts[2]

    def test_zero_and_none_are_what_the_precision_allows(self):
        a = symmetric(RNG.uniform(-1, 1, size=100))
        for one, other in zip(eigsh(a, 3, tol=0), eigsh(a, 3, tol=None), strict=True):
            np.testing.assert_array_equal(one, other)

    def test_the_seed_repeats_and_leaves_the_global_one(self):
        a = symmetric(RNG.uniform(-1, 1, size=100))
        before = np.random.get_state()[1].copy()
        (values, vectors), again, other = (eigsh(a, 3, seed=seed) for seed in (1, 1, 2))
        np.testing.assert_array_equal(np.random.get_state()[1], before)
        np.testing.assert_array_equal(again[0], values)
        np.testing.assert_array_equal(again[1], vectors)
        assert np.abs(other[1] - vectors).max() > 0
        np.testing.assert_allclose(other[0], values, atol=1e-12)


class TestErrors:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("after", [0, 5])
    def test_products_that_are_not_finite(self, after, bad):
        a = symmetric(RNG.normal(size=40))
        calls = []

        def matvec(v):
            calls.append(0)
            return a @ v if len(calls) <= after else np.where(np.arange(40) == 7, bad, a @ v)

        with pytest.raises(FloatingPointError, match="not finite"):
            eigsh(Known(40, matvec), 2)

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"which": "SM"}, "'LA', 'SA', 'LM' or 'BE' as `which`. Received: which='SM'"),
            ({"which": None}, "Received: which=None"),
            ({"k": 0}, "from 1 to 6, the size of the matrix, as `k`. Received: k=0"),
            ({"k": 7}, "Received: k=7"),
            ({"k": -1}, "Received: k=-1"),
            ({"k": 2.0}, "Received: k=2.0"),
            ({"k": True}, "Received: k=True"),
            ({"ncv": 2}, "above k=2, the vectors of its basis, as `ncv`. Received: ncv=2"),
            ({"ncv": 1}, "Received: ncv=1"),
            ({"ncv": 4.5}, "Received: ncv=4.5"),
            ({"ncv": True, "k": 1}, "Received: ncv=True"),
            ({"max_restarts": -1}, "0 or more, or None, as `max_restarts`. Received: max_restarts=-1"),
            ({"max_restarts": 1.5}, "Received: max_restarts=1.5"),
            ({"tol": -1e-3}, "0 or more, or None, as `tol`. Received: tol=-0.001"),
            ({"tol": np.nan}, "Received: tol=nan"),
            ({"tol": "small"}, "Received: tol='small'"),
        ],
        ids=str,
    )
    def test_options_that_do_not_fit(self, options, message):
        with pytest.raises(ValueError, match="^eigsh expects .*" + re.escape(message)):
            eigsh(np.eye(6), **({"k": 2} | options))

    def test_numpy_numbers_do(self):
        a = symmetric(np.arange(6.0))
        options = {"ncv": np.int32(5), "max_restarts": np.int64(50), "tol": np.float32(1e-6)}
        np.testing.assert_allclose(eigsh(a, np.int64(2), **options)[0], [4.0, 5.0], atol=1e-5)
        # A basis of the whole space needs no room for more.
        np.testing.assert_allclose(eigsh(a, 6, ncv=6)[0], np.arange(6.0), atol=1e-12)


class TestOfATrainedClassifier:
    @pytest.mark.parametrize("which", WHICH)
    def test_against_the_dense_matrix(self, which):
        hessian = trained_hessian()
        weights = hessian.model.get_weights()
        dense = hessian.dense()
        k = 2
        # What a product rounds is more than what the product of a NumPy matrix does.
        check(dense, hessian.eigsh(k, which), k, which, atol=2e-4 * np.abs(np.linalg.eigvalsh(dense)).max())
        for before, after in zip(weights, hessian.model.get_weights(), strict=True):
            np.testing.assert_array_equal(after, before)

    def test_options(self):
        hessian = trained_hessian()
        largest = np.linalg.eigvalsh(hessian.dense())[-1]
        values, vectors = hessian.eigsh(1, ncv=4, tol=1e-2, seed=3)
        assert vectors.shape == (56, 1) and abs(values[0] - largest) < 1e-2 * largest
        with pytest.raises(kg.curvature.EigenvalueConvergenceError, match="in 0 restarts") as caught:
            hessian.eigsh(3, ncv=4, max_restarts=0)
        assert caught.value.eigenvalues.shape == (3,)
        with pytest.raises(ValueError, match="from 1 to 56, the size of the matrix, as `k`"):
            hessian.eigsh(57)
