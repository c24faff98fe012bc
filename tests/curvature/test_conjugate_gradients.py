"""Conjugate gradients against direct solutions, and each reason for which they stop."""

import re

import numpy as np
import pytest
from keras import ops
from scipy.sparse import csr_array
from scipy.sparse import linalg as sparse

import keras_gradtools as kg
from tests.cases import tensor
from tests.curvature.test_eigenvalues import Counted, symmetric, trained_hessian

RNG = np.random.default_rng(0)
DTYPES = ["float32", "float64"]
N = 40
B = RNG.normal(size=N)
conjugate_gradients = kg.curvature.conjugate_gradients


def positive(dtype="float64", condition=100.0, n=N):
    return symmetric(np.geomspace(1.0, condition, n), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
class TestAgainstSolve:
    @pytest.mark.parametrize("damping", [0.0, 0.3])
    @pytest.mark.parametrize("start", [False, True])
    def test_values(self, start, damping, dtype):
        a, b, x0 = positive(dtype), B.astype(dtype), RNG.normal(size=N).astype(dtype) if start else None
        given = None if x0 is None else x0.copy()
        result = conjugate_gradients(a, b, x0, damping=damping, max_iterations=200)
        exact = np.linalg.solve(a.astype("float64") + damping * np.eye(N), B)
        assert result.reason == "converged" and result.negative_curvature is None and result.curvature is None
        assert result.x.dtype == dtype and result.x.shape == (N,)
        residual = np.linalg.norm(B - a @ result.x - damping * result.x)
        assert residual <= 1.5e-5 * np.linalg.norm(B)
        assert abs(result.residual_norm - residual) < 1e-5 * np.linalg.norm(B)
        # The least eigenvalue is 1: the error is at most the residual.
        assert np.linalg.norm(result.x - exact) <= residual + 1e-5
        np.testing.assert_array_equal(b, B.astype(dtype))
        if start:
            np.testing.assert_array_equal(x0, given)

    def test_tolerances(self, dtype):
        a, b = positive(dtype), B.astype(dtype)
        counts = []
        for options, bound in (({"rtol": 1e-1}, 1e-1 * np.linalg.norm(B)), ({"rtol": 0.0, "atol": 1e-3}, 1e-3)):
            result = conjugate_gradients(a, b, max_iterations=200, **options)
            assert result.reason == "converged"
            assert bound / 100 < np.linalg.norm(B - a @ result.x) <= 1.1 * bound
            counts.append(result.iterations)
        assert counts[0] < counts[1]
        # The larger of the two counts.
        assert conjugate_gradients(a, b, rtol=1e-5, atol=0.1 * np.linalg.norm(B)).iterations == counts[0]

    def test_a_start_at_the_solution_takes_no_iteration(self, dtype):
        matrix = Counted(positive(dtype))
        result = conjugate_gradients(matrix, matrix.a @ np.ones(N, dtype), np.ones(N))
        assert (result.reason, result.iterations, matrix.count) == ("converged", 0, 1)
        np.testing.assert_array_equal(result.x, np.ones(N))

    def test_nothing_to_solve(self, dtype):
        matrix = Counted(positive(dtype))
        result = conjugate_gradients(matrix, np.zeros(N, dtype))
        assert (result.reason, result.iterations, result.residual_norm, matrix.count) == ("converged", 0, 0.0, 0)
        np.testing.assert_array_equal(result.x, np.zeros(N))

    def test_few_different_eigenvalues_take_as_many_products(self, dtype):
        matrix = Counted(symmetric(np.repeat([1.0, 2.0, 5.0, 7.0], N // 4), dtype))
        result = conjugate_gradients(matrix, B.astype(dtype))
        assert (result.reason, result.iterations, matrix.count) == ("converged", 4, 4)

    def test_one_equation(self, dtype):
        result = conjugate_gradients(np.array([[4.0]], dtype), np.array([2.0], dtype))
        assert (result.reason, result.iterations) == ("converged", 1)
        np.testing.assert_array_equal(result.x, [0.5])


class TestPreconditioner:
    scales = np.geomspace(1e-2, 1e2, N)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", ["array", "tensor", "function", "function of tensors"])
    def test_the_diagonal_of_a_badly_scaled_matrix(self, kind, dtype):
        a = (self.scales[:, None] * positive(condition=4.0) * self.scales).astype(dtype)
        inverse = (1 / np.diag(a)).astype(dtype)
        given = {
            "array": inverse,
            "tensor": tensor(inverse, dtype),
            "function": lambda v: inverse * v,
            "function of tensors": lambda v: tensor(inverse * v, dtype),
        }[kind]
        b = (a @ np.ones(N)).astype(dtype)
        found = conjugate_gradients(a, b, preconditioner=given, max_iterations=2000)
        plain = conjugate_gradients(a, b, max_iterations=2000)
        assert found.reason == "converged" and found.x.dtype == dtype
        assert 3 * found.iterations < plain.iterations
        assert np.linalg.norm(a @ found.x - b) <= 2e-5 * np.linalg.norm(b)

    def test_the_inverse_takes_one_iteration(self):
        a = positive()
        result = conjugate_gradients(a, B, damping=2.0, preconditioner=lambda v: np.linalg.solve(a + 2 * np.eye(N), v))
        assert (result.reason, result.iterations) == ("converged", 1)
        np.testing.assert_allclose(result.x, np.linalg.solve(a + 2 * np.eye(N), B), rtol=1e-9)

    def test_one_that_is_not_positive_is_not_taken_for_the_matrix(self):
        # `curvature` would be that of a direction of positive curvature.
        try:
            result = conjugate_gradients(positive(), B, preconditioner=lambda v: -v)
        except ValueError:
            return
        assert result.reason != "negative_curvature"


@pytest.mark.parametrize("dtype", DTYPES)
class TestNegativeCurvature:
    @pytest.mark.parametrize("lowest", [-5.0, -0.1])
    @pytest.mark.parametrize("damping", [0.0, 0.05])
    def test_the_direction_and_its_curvature(self, damping, lowest, dtype):
        a = symmetric(np.concatenate([[lowest], np.linspace(0.5, 3, N - 1)]), dtype)
        result = conjugate_gradients(a, B.astype(dtype), damping=damping, rtol=1e-6, max_iterations=200)
        assert result.reason == "negative_curvature"
        d = result.negative_curvature.astype("float64")
        assert result.negative_curvature.dtype == dtype and np.linalg.norm(d) > 0
        curvature = d @ (a.astype("float64") @ d + damping * d) / (d @ d)
        assert curvature <= 0
        np.testing.assert_allclose(result.curvature, curvature, rtol=1e-3, atol=1e-6)
        # The last x before it lowers the quadratic, or is the start.
        q = 0.5 * result.x @ (a @ result.x + damping * result.x) - B @ result.x
        assert q < 0 if result.iterations > 1 else np.all(result.x == 0)
        enough = conjugate_gradients(a, B.astype(dtype), damping=damping - lowest + 0.1, max_iterations=300)
        assert enough.reason == "converged"

    def test_a_negative_matrix(self, dtype):
        result = conjugate_gradients(-np.eye(3, dtype=dtype), np.array([1.0, 2.0, 2.0], dtype))
        assert (result.reason, result.iterations, result.curvature) == ("negative_curvature", 1, -1.0)
        np.testing.assert_array_equal(result.negative_curvature, [1.0, 2.0, 2.0])
        np.testing.assert_array_equal(result.x, np.zeros(3))

    def test_a_matrix_of_zeros(self, dtype):
        result = conjugate_gradients(np.zeros((3, 3), dtype), np.ones(3, dtype))
        assert (result.reason, result.curvature) == ("negative_curvature", 0.0)

    def test_a_singular_matrix_and_a_vector_that_it_reaches(self, dtype):
        a = symmetric(np.concatenate([np.zeros(10), np.linspace(1, 4, N - 10)]), dtype)
        b = (a @ B).astype(dtype)
        result = conjugate_gradients(a, b)
        assert result.reason == "converged"
        np.testing.assert_allclose(result.x, np.linalg.lstsq(a.astype("float64"), b, rcond=1e-5)[0], atol=1e-3)

    def test_a_singular_matrix_and_a_vector_that_it_does_not(self, dtype):
        a = np.diag(np.concatenate([[0.0], np.linspace(1, 4, 9)])).astype(dtype)
        result = conjugate_gradients(a, np.ones(10, dtype), max_iterations=100)
        assert result.reason == "negative_curvature"
        d = result.negative_curvature
        # What remains is the direction of no curvature.
        assert np.abs(d[1:]).max() < 1e-2 * abs(d[0]) and abs(result.curvature) < 1e-4


class TestStops:
    @pytest.mark.parametrize("limit", [0, 1, 7])
    def test_at_so_many_products(self, limit):
        matrix = Counted(positive())
        result = conjugate_gradients(matrix, B, max_iterations=limit)
        assert (result.reason, result.iterations, matrix.count) == ("max_iterations", limit, limit)
        np.testing.assert_allclose(result.residual_norm, np.linalg.norm(B - matrix.a @ result.x), rtol=1e-9)

    def test_after_n_by_default(self):
        result = conjugate_gradients(positive(condition=1e8), B, rtol=1e-14)
        assert (result.reason, result.iterations) == ("max_iterations", N)

    def test_where_progress_is_slow(self):
        a = symmetric(np.geomspace(1e-5, 1.0, 300))
        b = a @ np.random.default_rng(1).normal(size=300)
        matrix = Counted(a)
        early = conjugate_gradients(matrix, b, rtol=1e-9, progress_tol=5e-4, max_iterations=2000)
        late = conjugate_gradients(a, b, rtol=1e-9, max_iterations=2000)
        assert early.reason == "progress" and early.iterations == matrix.count < late.iterations / 3

        def quadratic(x):
            return 0.5 * x @ a @ x - b @ x

        # Martens' rule as he states it, at this iteration and not at the one before.
        values = [
            quadratic(conjugate_gradients(a, b, rtol=0.0, max_iterations=i).x) for i in range(early.iterations + 1)
        ]
        slow = [
            i > (k := max(10, int(0.1 * i))) and (values[i] - values[i - k]) / values[i] < k * 5e-4
            for i in range(len(values))
        ]
        assert slow[-1] and not any(slow[:-1])
        np.testing.assert_allclose(quadratic(early.x), values[-1], rtol=1e-9)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_where_a_number_is_not_finite(self, bad):
        b = B.copy()
        b[3] = bad
        assert conjugate_gradients(positive(), b).reason == "not_finite"
        a = positive()
        a[3, 3] = bad
        result = conjugate_gradients(a, B)
        assert result.reason == "not_finite" and np.isfinite(result.x).all()
        result = conjugate_gradients(positive(), B, preconditioner=lambda v: v * bad)
        assert result.reason == "not_finite" and np.isfinite(result.x).all()


class TestPrecision:
    @pytest.mark.parametrize("n, condition", [(500, 1e4), (2000, 1e6)])
    def test_single_precision_is_no_worse_than_scipy(self, n, condition):
        # A diagonal matrix: its condition is all that the iteration sees.
        values = np.geomspace(1 / condition, 1.0, n).astype("float32")
        a = sparse.LinearOperator((n, n), matvec=lambda v: values * v.reshape(-1), dtype="float32")
        b = np.random.default_rng(2).normal(size=n).astype("float32")
        ours = conjugate_gradients(a, b, rtol=1e-5, max_iterations=3000)
        theirs, _ = sparse.cg(a, b, rtol=1e-5, maxiter=3000)
        assert ours.reason in ("converged", "max_iterations")

        def residual(x):
            return np.linalg.norm(b.astype("float64") - values.astype("float64") * x) / np.linalg.norm(b)

        assert residual(ours.x) <= 1.2 * residual(theirs)

    @pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e25])
    def test_squares_out_of_range(self, scale):
        a, b = positive("float32", 10.0), (scale * B).astype("float32")
        result = conjugate_gradients(a, b)
        assert result.reason == "converged"
        np.testing.assert_allclose(result.x / scale, np.linalg.solve(positive(condition=10.0), B), atol=1e-4)


class TestKinds:
    @pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.float64)])
    def test_a_tensor_for_a_tensor(self, dtype):
        result = conjugate_gradients(positive(), tensor(B, dtype), tensor(np.ones(N), dtype))
        assert ops.is_tensor(result.x) and result.x.dtype == tensor(B, dtype).dtype
        np.testing.assert_allclose(ops.convert_to_numpy(result.x), np.linalg.solve(positive(), B), atol=1e-4)
        bad = conjugate_gradients(-np.eye(N), tensor(B, dtype))
        assert ops.is_tensor(bad.negative_curvature)

    def test_integers_have_real_solutions(self):
        a = np.diag([2.0, 4.0])
        for b in (np.array([1, 1]), tensor([1, 1], "int32"), [1, 1]):
            found = ops.convert_to_numpy(conjugate_gradients(a, b).x)
            np.testing.assert_allclose(found, [0.5, 0.25])

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_precision_comes_back_as_it_was(self, dtype):
        b = tensor([1.0, 1.0], dtype)
        result = conjugate_gradients(np.diag([2.0, 4.0]), b)
        assert result.x.dtype == b.dtype
        np.testing.assert_array_equal(ops.convert_to_numpy(ops.cast(result.x, "float32")), [0.5, 0.25])

    @pytest.mark.parametrize("kind", ["array", "operator", "sparse", "anything"])
    def test_matrices(self, kind):
        a = positive()
        given = {
            "array": a,
            "operator": sparse.aslinearoperator(a),
            "sparse": csr_array(a),
            "anything": Counted(a),
        }[kind]
        np.testing.assert_allclose(conjugate_gradients(given, B).x, np.linalg.solve(a, B), atol=1e-4)

    @pytest.mark.parametrize("kind", ["array", "tensor"])
    def test_a_hessian(self, kind):
        hessian = trained_hessian()
        weights = hessian.model.get_weights()
        dense = hessian.dense().astype("float64")
        damping = 0.05 - np.linalg.eigvalsh(dense)[0]
        b = np.random.default_rng(3).normal(size=len(dense)).astype("float32")
        given = b if kind == "array" else tensor(b)
        result = conjugate_gradients(hessian, given, damping=damping, rtol=1e-4)
        assert result.reason == "converged" and ops.is_tensor(result.x) == (kind == "tensor")
        x = ops.convert_to_numpy(result.x)
        np.testing.assert_allclose(x, np.linalg.solve(dense + damping * np.eye(len(b)), b), atol=1e-2)
        assert np.linalg.norm(dense @ x + damping * x - b) < 2e-4 * np.linalg.norm(b)
        for before, after in zip(weights, hessian.model.get_weights(), strict=True):
            np.testing.assert_array_equal(after, before)


class TestErrors:
    @pytest.mark.parametrize(
        "b",
        [np.ones((2, 1)), np.float64(1.0), np.ones(0), np.ones(2) + 1j, np.array([True, False]), np.array(["a", "b"])],
        ids=str,
    )
    def test_vectors(self, b):
        with pytest.raises(ValueError, match="^conjugate_gradients expects real numbers of shape \\(n,\\) as `b`"):
            conjugate_gradients(np.eye(2), b)

    @pytest.mark.parametrize("a", [np.eye(3), np.ones((2, 3)), np.ones(2)], ids=str)
    def test_matrices(self, a):
        with pytest.raises(ValueError, match="expects a square matrix for b of shape \\(2,\\). Received: shape"):
            conjugate_gradients(a, np.ones(2))

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"x0": np.ones(3)}, "real numbers of shape (2,) as `x0`"),
            ({"damping": -1.0}, "0 or more as `damping`. Received: damping=-1.0"),
            ({"damping": np.inf}, "`damping`. Received: damping=inf"),
            ({"damping": True}, "`damping`. Received: damping=True"),
            ({"rtol": -1e-3}, "`rtol`. Received: rtol=-0.001"),
            ({"rtol": np.nan}, "`rtol`. Received: rtol=nan"),
            ({"atol": "small"}, "`atol`. Received: atol='small'"),
            ({"progress_tol": -1}, "`progress_tol`. Received: progress_tol=-1"),
            ({"max_iterations": -1}, "0 or more, or None, as `max_iterations`. Received: max_iterations=-1"),
            ({"max_iterations": 2.0}, "`max_iterations`. Received: max_iterations=2.0"),
            ({"max_iterations": True}, "`max_iterations`. Received: max_iterations=True"),
            ({"preconditioner": np.ones(3)}, "a function, or 2 positive numbers"),
            ({"preconditioner": np.array([1.0, 0.0])}, "a function, or 2 positive numbers"),
            ({"preconditioner": np.array([1.0, np.nan])}, "a function, or 2 positive numbers"),
        ],
        ids=str,
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match="^conjugate_gradients expects .*" + re.escape(message)):
            conjugate_gradients(np.eye(2), np.ones(2), **options)


def test_the_callback_sees_each_iterate():
    a, b, seen = np.diag([1.0, 4.0, 9.0]), np.array([1.0, 2.0, 3.0]), []
    result = kg.curvature.conjugate_gradients(a, b, callback=lambda i, x, q: seen.append((i, x, q)))
    assert [i for i, _, _ in seen] == [1, 2, 3]
    np.testing.assert_array_equal(seen[-1][1], result.x)
    for _, x, q in seen:
        np.testing.assert_allclose(q, 0.5 * x @ a @ x - b @ x, rtol=1e-12)
