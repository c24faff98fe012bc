"""The preconditioner that is made of earlier products, against matrices whose eigenpairs are known."""

import warnings

import numpy as np
import pytest
from keras import ops

from keras_gradtools.curvature.solvers.conjugate_gradients import conjugate_gradients
from keras_gradtools.second_order.recycled_preconditioner import (
    RecycledPreconditioner,
    recycled_preconditioner,
    require_rank,
)

DTYPES = {"float32": 2e-4, "float64": 1e-9}


def orthogonal(n, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]


def symmetric(values, seed=0):
    vectors = orthogonal(len(values), seed)
    return (vectors * values) @ vectors.T


def shown(preconditioner, matrix, directions):
    """Records products with rows."""
    dtype = preconditioner.vectors.dtype
    for d in directions:
        preconditioner.record(d.astype(dtype), (matrix @ d).astype(dtype))
    preconditioner.finish()


def draws(count, n, seed=1):
    return np.random.default_rng(seed).normal(size=(count, n))


def dense(apply, n, dtype="float64"):
    return np.stack([apply(v) for v in np.eye(n, dtype=dtype)])


class TestPairs:
    @pytest.mark.parametrize(("dtype", "rtol"), DTYPES.items())
    def test_of_the_whole_space_they_are_the_eigenpairs(self, dtype, rtol):
        n = 12
        matrix = symmetric(np.linspace(-3, 5, n))
        preconditioner = RecycledPreconditioner(n, n, dtype)
        shown(preconditioner, matrix, orthogonal(n, 1))
        vectors, values = preconditioner.vectors, preconditioner.values
        assert vectors.dtype == dtype and np.all(np.diff(np.abs(values)) <= 0)
        np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(matrix), rtol=rtol, atol=rtol)
        np.testing.assert_allclose(vectors @ vectors.T, np.eye(n), atol=rtol)
        np.testing.assert_allclose(vectors.T @ (values[:, None] * vectors), matrix, atol=10 * rtol)

    @pytest.mark.parametrize("rank", [5, 30])
    def test_the_largest_are_kept(self, rank):
        n, former = 30, 20
        matrix = symmetric(np.linspace(1, 4, n))
        preconditioner = RecycledPreconditioner(n, rank, "float64")
        if rank < n:
            # Directions that hold the eigenvectors of the largest eigenvalues.
            directions = np.linalg.eigh(matrix)[1][:, -rank:].T
            shown(preconditioner, matrix, orthogonal(rank) @ directions)
            np.testing.assert_allclose(preconditioner.values, np.linalg.eigvalsh(matrix)[::-1][:rank], rtol=1e-9)
        else:
            directions = orthogonal(n, 1)[:former]
            shown(preconditioner, matrix, directions)
            expected = np.linalg.eigvalsh(directions @ matrix @ directions.T)[::-1]
            np.testing.assert_allclose(preconditioner.values, np.r_[expected, np.zeros(n - former)], rtol=1e-9)

    @pytest.mark.parametrize("fresh", [10, 15])
    def test_the_least_change_that_fits_what_was_seen(self, fresh):
        n, rank = 30, 30
        before, after = symmetric(np.linspace(2, 9, n), 1), symmetric(np.linspace(1, 8, n), 2)
        preconditioner = RecycledPreconditioner(n, rank, "float64")
        # Former vectors orthogonal to the new directions, so that all of their span is left of them.
        axes = orthogonal(n, 3)
        shown(preconditioner, before, axes[fresh:])
        model, smallest = former_matrix(preconditioner)
        directions = np.random.default_rng(4).normal(size=(fresh, fresh)) @ axes[:fresh]
        shown(preconditioner, after, directions)
        p = axes[:fresh].T @ axes[:fresh]
        rest = np.eye(n) - p
        # The formula of Powell, Symmetric, Broyden for a block.
        expected = after @ p + p @ after - p @ after @ p + rest @ model @ rest
        assert smallest > 0
        np.testing.assert_allclose(former_matrix(preconditioner)[0], expected, atol=1e-8)

    def test_a_former_vector_along_the_new_directions_is_replaced(self):
        n = 20
        before, after = np.diag(np.linspace(1, 20, n)), np.diag(np.linspace(20, 1, n))
        preconditioner = RecycledPreconditioner(n, n, "float64")
        shown(preconditioner, before, np.eye(n))
        shown(preconditioner, after, np.eye(n)[:12])
        found = former_matrix(preconditioner)[0]
        np.testing.assert_allclose(found, np.diag(np.r_[np.diag(after)[:12], np.diag(before)[12:]]), atol=1e-9)

    @pytest.mark.parametrize(("share", "found"), [(0.5, 10), (0.6, 20)])
    def test_a_former_vector_near_the_new_directions_is_replaced(self, share, found):
        # With this share of it outside them, whose square is compared with 0.3.
        n = 20
        preconditioner = RecycledPreconditioner(n, n, "float64")
        shown(preconditioner, 7 * np.eye(n), (1 - share**2) ** 0.5 * np.eye(n)[:10] + share * np.eye(n)[10:])
        preconditioner.begin()
        shown(preconditioner, np.eye(n), np.eye(n)[:10])
        assert np.count_nonzero(preconditioner.values) == found
        np.testing.assert_allclose(preconditioner.values[found - 10 : found], 1.0)

    def test_dependent_directions_are_one(self):
        n = 20
        matrix = symmetric(np.linspace(1, 5, n))
        preconditioner = RecycledPreconditioner(n, n, "float64")
        directions = draws(10, n)
        shown(preconditioner, matrix, np.concatenate([directions, directions[:5] + 1e-9 * draws(5, n, 2)]))
        assert np.count_nonzero(preconditioner.values) == 10
        basis = np.linalg.qr(directions.T)[0]
        expected = np.linalg.eigvalsh(basis.T @ matrix @ basis)[::-1]
        np.testing.assert_allclose(preconditioner.values[:10], expected, rtol=1e-6)

    def test_few_products_tell_nothing(self):
        preconditioner = RecycledPreconditioner(30, 30, "float64")
        shown(preconditioner, np.eye(30), draws(9, 30))
        assert not preconditioner.values.any() and preconditioner.of(0.1) is None
        shown(preconditioner, np.eye(30), draws(10, 30))
        assert np.count_nonzero(preconditioner.values) == 10

    def test_more_products_than_there_is_room_for(self):
        n, rank = 40, 10
        matrix = symmetric(np.r_[np.ones(n - rank), np.linspace(50, 100, rank)])
        preconditioner = RecycledPreconditioner(n, rank, "float64")
        shown(preconditioner, matrix, draws(3 * rank, n))
        assert preconditioner.vectors.shape == (rank, n)
        np.testing.assert_allclose(preconditioner.vectors @ preconditioner.vectors.T, np.eye(rank), atol=1e-9)
        assert preconditioner.values[0] > 60

    @pytest.mark.parametrize("count", [5, 12, 30])
    def test_products_recorded_at_once_count_as_those_recorded_one_by_one(self, count):
        # Also with more of them than there is room for, and with some that are not finite.
        n, rank = 25, 12
        matrix = symmetric(np.geomspace(0.1, 50, n))
        directions = draws(count, n)
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        products = directions @ matrix
        products[2, 3] = np.nan
        first, second = (RecycledPreconditioner(n, rank, "float64") for _ in range(2))
        for _ in range(2):
            first.record_all(directions, products)
            first.finish()
            for direction, product in zip(directions, products, strict=True):
                second.record(direction, product)
            second.finish()
        assert first.values.any() == (count > 5)
        np.testing.assert_allclose(first.values, second.values, rtol=1e-9)
        np.testing.assert_allclose(np.abs(np.sum(first.vectors * second.vectors, axis=1)), first.values != 0, atol=1e-6)

    def test_knows_whether_its_pairs_are_those_that_were_restored(self):
        n = 15
        matrix = symmetric(np.geomspace(0.1, 50, n))
        source, other = (RecycledPreconditioner(n, n, "float32") for _ in range(2))
        shown(source, matrix, draws(n, n))
        vectors, values = ops.convert_to_tensor(source.vectors), source.values.astype("float32")
        other.restore(vectors, values, np.array(source.state, "float32"))
        assert not other.has_new_pairs and other.state == pytest.approx(source.state)
        v = draws(1, n)[0].astype("float32")
        np.testing.assert_allclose(other.of(0.1)(v), source.of(0.1)(v), rtol=1e-5, atol=1e-6)
        shown(other, matrix, draws(5, n))
        assert not other.has_new_pairs
        shown(other, matrix, draws(n, n))
        assert other.has_new_pairs

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_what_is_not_finite_is_left_out(self, bad):
        n = 15
        preconditioner = RecycledPreconditioner(n, n, "float32")
        product = np.ones(n, "float32")
        product[3] = bad
        preconditioner.record(np.ones(n, "float32"), product)
        preconditioner.record(np.full(n, bad, "float32"), np.ones(n, "float32"))
        preconditioner.record(np.zeros(n, "float32"), np.zeros(n, "float32"))
        preconditioner.record(np.ones(n, "float32"), np.full(n, 3e38, "float32"))
        shown(preconditioner, np.diag(np.arange(1.0, n + 1)), np.eye(n)[:12])
        assert np.isfinite(preconditioner.vectors).all() and np.isfinite(preconditioner.values).all()

    def test_a_matrix_of_zeros_has_none(self):
        preconditioner = RecycledPreconditioner(12, 12, "float64")
        shown(preconditioner, np.zeros((12, 12)), draws(12, 12))
        assert preconditioner.of(0.0) is None

    def test_what_was_returned_stays_as_it_was(self):
        n = 20
        preconditioner = RecycledPreconditioner(n, n, "float64")
        shown(preconditioner, symmetric(np.geomspace(0.1, 5, n)), orthogonal(n, 1))
        apply, v = preconditioner.of(0.1), np.ones(n)
        before = apply(v)
        shown(preconditioner, symmetric(np.geomspace(0.1, 9, n), 5), orthogonal(n, 6))
        np.testing.assert_array_equal(apply(v), before)
        assert not np.allclose(preconditioner.of(0.1)(v), before)

    def test_what_was_missed_of_a_new_matrix(self):
        n, rank = 40, 10
        values = np.r_[np.linspace(0.1, 1, n - rank), np.linspace(20, 400, rank)]
        preconditioner = RecycledPreconditioner(n, rank, "float64")
        before = np.linalg.eigh(symmetric(values, 1))[1][:, -rank:].T
        shown(preconditioner, symmetric(values, 1), before)
        assert preconditioner.missed == pytest.approx(0.01 * 400)
        # Each of the same matrix, and then one with other eigenvectors.
        for seed in (1, 2):
            matrix = symmetric(values, seed)
            after = np.linalg.eigh(matrix)[1][:, -rank:].T
            preconditioner.begin()
            shown(preconditioner, matrix, after)
            found, known = preconditioner.values, (preconditioner.vectors @ before.T) ** 2
            expected = np.max(np.abs(found) * (1 - known.sum(1)))
            assert preconditioner.missed == pytest.approx(expected, rel=1e-6, abs=1e-9)
            before = preconditioner.vectors
        assert preconditioner.missed > 10
        # What is learned within the systems of one matrix says nothing of that.
        missed = preconditioner.missed
        shown(preconditioner, matrix, draws(12, n))
        assert preconditioner.missed == missed

    def test_nearly_parallel_directions_in_single_precision(self):
        n, rank = 20_000, 12
        draw = np.random.default_rng(0)
        preconditioner = RecycledPreconditioner(n, rank, "float32")
        common, eigenvalues = draw.normal(size=n), np.linspace(1, 50, n)
        for _ in range(20):
            for _ in range(rank):
                direction = common + 0.15 * draw.normal(size=n)
                preconditioner.record(direction.astype("float32"), (eigenvalues * direction).astype("float32"))
            preconditioner.finish()
        found = np.count_nonzero(preconditioner.values)
        vectors = preconditioner.vectors[:found].astype("float64")
        np.testing.assert_allclose(vectors @ vectors.T, np.eye(found), atol=3e-6)

    def test_an_eigenvalue_beyond_single_precision_changes_nothing(self):
        n = 12
        preconditioner = RecycledPreconditioner(n, n, "float32")
        # Finite products with all directions, whose matrix is not.
        for i in range(n):
            preconditioner.record(np.eye(n, dtype="float32")[i], np.full(n, 3e38, "float32"))
        preconditioner.finish()
        assert not preconditioner.values.any() and preconditioner.of(0.0) is None

    def test_a_former_eigenvalue_that_is_gone(self):
        # One large eigenvalue once, of a vector that the next systems see no more than a tenth of.
        n, rank = 40, 12
        draw = np.random.default_rng(0)
        matrix = symmetric(np.linspace(1, 2, n))
        preconditioner = RecycledPreconditioner(n, rank, "float64")
        outlier = draw.normal(size=n)
        outlier /= np.linalg.norm(outlier)
        shown(preconditioner, matrix + 1e8 * np.outer(outlier, outlier), draws(rank, n))
        assert preconditioner.values[0] > 1e6
        preconditioner.begin()
        shown(preconditioner, matrix, draws(rank, n, 3))
        # A multiple of what was seen, and not of what once was.
        assert np.abs(preconditioner.values[0]) < 100

    @pytest.mark.parametrize("scale", [0.1, 0.3])
    def test_products_too_large_change_nothing(self, scale):
        n = 15
        preconditioner = RecycledPreconditioner(n, n, "float32")
        shown(preconditioner, symmetric(np.linspace(1, 2, n)), draws(n, n))
        before = preconditioner.vectors.copy(), preconditioner.values.copy(), preconditioner.missed
        preconditioner.begin()
        with warnings.catch_warnings(action="error"):
            for _ in range(12):
                # Of which the products with the directions are infinite, if not they themselves.
                preconditioner.record(np.full(n, scale, "float32"), np.full(n, 3.4e38, "float32"))
            preconditioner.finish()
        for a, b in zip(before, (preconditioner.vectors, preconditioner.values, preconditioner.missed), strict=True):
            np.testing.assert_array_equal(a, b)


def former_matrix(preconditioner):
    """The matrix that is taken for the true one, and the value that it has outside what is known."""
    found = np.count_nonzero(preconditioner.values)
    vectors, values = preconditioner.vectors[:found], preconditioner.values[:found]
    smallest = abs(values[-1])
    return smallest * np.eye(vectors.shape[1]) + vectors.T @ ((values - smallest)[:, None] * vectors), smallest


class TestPreconditioner:
    @pytest.mark.parametrize(("dtype", "atol"), DTYPES.items())
    @pytest.mark.parametrize("damping", [0.0, 0.5])
    def test_brings_the_largest_to_the_smallest_of_these(self, damping, dtype, atol):
        n, rank = 20, 12
        eigenvalues = np.r_[np.linspace(0.1, 1, n - rank), 2.0, np.linspace(-3, -9, 3), np.linspace(5, 40, rank - 4)]
        matrix = symmetric(eigenvalues)
        values, vectors = np.linalg.eigh(matrix)
        largest = np.argsort(-np.abs(values))[:rank]
        preconditioner = RecycledPreconditioner(n, rank, dtype)
        shown(preconditioner, matrix, vectors[:, largest].T)
        inverse = dense(preconditioner.of(damping), n, dtype)
        np.testing.assert_allclose(inverse, inverse.T, atol=atol)
        assert np.linalg.eigvalsh(inverse)[0] > 0
        found = np.sort(np.linalg.eigvals(inverse @ (matrix + damping * np.eye(n))).real)
        # The negative ones stay negative, by their absolute values.
        negative = -(2 + damping) * (3 * np.ones(3) - damping + np.arange(3) * 3) / (3 + damping + np.arange(3) * 3)
        expected = np.sort(np.r_[np.linspace(0.1, 1, n - rank) + damping, np.full(rank - 3, 2 + damping), negative])
        np.testing.assert_allclose(found, expected, atol=10 * atol)

    def test_none_where_it_is_not_worth_it(self):
        n = 20
        flat, steep = symmetric(np.linspace(3, 5, n)), symmetric(np.geomspace(0.05, 5, n))
        preconditioner = RecycledPreconditioner(n, n, "float64")
        systems = []
        for system in range(60):
            preconditioner.begin()
            before = preconditioner.vectors
            shown(preconditioner, flat, orthogonal(n, system))
            assert preconditioner.of(0.1) is None
            if preconditioner.vectors is not before:
                systems.append(system)
        assert systems == [0, 2, 6, 14, 30, 46]
        # Few products do not count as a system.
        waited = preconditioner.waited
        shown(preconditioner, flat, orthogonal(n)[:9])
        assert preconditioner.waited == waited
        for system in range(2, 18):
            preconditioner.begin()
            shown(preconditioner, steep, orthogonal(n, system))
        assert preconditioner.of(0.1) is not None and preconditioner.wait == 0

    @pytest.mark.parametrize(("missed", "lowest"), [(3.0, 3.0), (0.0, 0.04)])
    def test_brings_none_below_what_was_missed(self, missed, lowest):
        n = 20
        values = np.geomspace(1e-4, 40, n)
        matrix = symmetric(values)
        preconditioner = RecycledPreconditioner(n, n, "float64")
        shown(preconditioner, matrix, orthogonal(n, 1))
        preconditioner.missed = missed
        found = np.linalg.eigvals(dense(preconditioner.of(0.0), n) @ matrix).real
        np.testing.assert_allclose(np.sort(found), np.minimum(values, lowest), rtol=1e-6)

    def test_stays_positive_definite_where_the_matrix_is_singular(self):
        n = 15
        matrix = symmetric(np.r_[np.zeros(5), np.full(4, 1e-12), np.linspace(1, 2, 6)])
        preconditioner = RecycledPreconditioner(n, n, "float64")
        shown(preconditioner, matrix, orthogonal(n, 1))
        preconditioner.missed = 0.0
        assert np.linalg.eigvalsh(dense(preconditioner.of(0.0), n))[0] > 1e-4

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rank", [20, 40])
    def test_a_sequence_of_matrices_takes_fewer_products(self, rank, dtype):
        n = 300
        vectors = orthogonal(n)
        change = np.random.default_rng(8).normal(size=(n, n))
        change = 1e-4 * (change - change.T)
        eigenvalues = np.r_[np.geomspace(1e-2, 2e-2, n - rank), np.geomspace(0.1, 100, rank)]
        preconditioner = RecycledPreconditioner(n, rank, dtype)
        counts = []
        for step in range(6):
            turned = vectors @ np.linalg.solve(np.eye(n) - step * change, np.eye(n) + step * change)
            matrix = ((turned * eigenvalues) @ turned.T).astype(dtype)
            b = np.random.default_rng(step).normal(size=n).astype(dtype)
            preconditioner.begin()
            taken = []
            for use in (None, preconditioner):
                result = conjugate_gradients(
                    Recorded(matrix, use), b, preconditioner=use and use.of(1e-3), damping=1e-3, rtol=1e-3
                )
                assert result.reason == "converged"
                residual = b - matrix @ result.x - 1e-3 * result.x
                assert np.linalg.norm(residual) < 2e-3 * np.linalg.norm(b)
                taken.append(result.iterations)
            preconditioner.finish()
            counts.append(taken)
        plain, preconditioned = np.array(counts).T
        assert preconditioned[0] == plain[0]
        # The second one does not know yet how much it may trust.
        assert np.all(preconditioned[2:] <= plain[2:]) and sum(preconditioned[2:]) < 0.8 * sum(plain[2:])


class Recorded:
    def __init__(self, matrix, preconditioner):
        self._matrix, self._preconditioner = matrix, preconditioner

    def __matmul__(self, v):
        product = self._matrix @ v
        if self._preconditioner is not None:
            self._preconditioner.record(v, product)
        return product


@pytest.mark.parametrize(
    ("size", "rank", "expected"),
    [(2410, None, 100), (50, None, 50), (3, None, 3), (10**5, None, 10), (2**17, None, 8), (2**18, None, 0)]
    + [(2410, 0, 0), (2410, 7, 7), (5, 7, 5), (10**6, 3, 3), (0, None, 0), (0, 5, 0)],
)
def test_ranks(size, rank, expected):
    found = recycled_preconditioner(size, rank, "float32")
    assert (0 if found is None else len(found.values)) == expected


@pytest.mark.parametrize("rank", [-1, 1.5, True, "all"])
def test_a_rank_that_is_none(rank):
    with pytest.raises(ValueError, match="NewtonCG expects an integer of 0 or more, or None, as `preconditioner_rank`"):
        require_rank("NewtonCG", rank)
