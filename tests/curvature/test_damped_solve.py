"""Damped equations against direct solutions, and the damping that a matrix needs."""

import re

import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from tests.cases import tensor
from tests.curvature.test_eigenvalues import symmetric, trained_hessian

RNG = np.random.default_rng(0)
N = 12
B = RNG.normal(size=N)
damped_solve = kg.curvature.damped_solve


@pytest.fixture(autouse=True)
def no_inverse(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an explicit inverse was formed")

    for name in ("inv", "pinv"):
        monkeypatch.setattr(np.linalg, name, refuse)


def check(a, b, solution):
    """Asserts that it solves the equation with its own damping."""
    damped = a + solution.damping * np.eye(len(a))
    x = ops.convert_to_numpy(solution.x)
    np.testing.assert_allclose(x, np.linalg.solve(damped, b), rtol=1e-6, atol=1e-9)
    assert np.linalg.eigvalsh(damped)[0] > -1e-13 * np.abs(damped).max()


class TestPositiveDefinite:
    @pytest.mark.parametrize("shape", [(N,), (N, 1), (N, 3), (N, N)], ids=str)
    @pytest.mark.parametrize("damping", [0.0, 0, 0.5, np.float32(3.0)])
    def test_values(self, damping, shape):
        a, b = symmetric(np.geomspace(1e-3, 10, N)), RNG.normal(size=shape)
        kept = a.copy(), b.copy()
        solution = damped_solve(a, b, damping)
        assert solution.x.shape == shape and (solution.damping, solution.attempts) == (float(damping), 1)
        assert isinstance(solution.damping, float)
        check(a, b, solution)
        for given, before in zip((a, b), kept, strict=True):
            np.testing.assert_array_equal(given, before)

    def test_single_precision_is_solved_in_double(self):
        a = symmetric(np.geomspace(1e-6, 1, N), "float32") + 1e-5 * np.eye(N, dtype="float32")
        b = B.astype("float32")
        found = damped_solve(a, b)
        np.testing.assert_allclose(found.x, np.linalg.solve(a.astype("float64"), b), rtol=1e-6)

    def test_one_equation(self):
        solution = damped_solve([[4.0]], [2.0])
        np.testing.assert_array_equal(solution.x, [0.5])

    def test_only_the_lower_triangle_is_read(self):
        a = symmetric(np.linspace(1, 3, N))
        upper = np.triu_indices(N, 1)
        for filling in (0.0, 1e9, np.nan):
            lower = a.copy()
            lower[upper] = filling
            np.testing.assert_allclose(damped_solve(lower, B).x, np.linalg.solve(a, B), rtol=1e-9)
        # Nor for the first damping of a matrix that needs some.
        a = symmetric(np.linspace(-1, 3, N))
        lower = a.copy()
        lower[upper] = 1e9
        assert damped_solve(lower, B).damping == damped_solve(a, B).damping


class TestLadder:
    @pytest.mark.parametrize("lowest", [-1e-6, -0.3, -20.0])
    @pytest.mark.parametrize("damping", [0.0, 1e-3, 0.1])
    @pytest.mark.parametrize("factor", [1.5, 2.0, 4, 10.0, 1000.0])
    def test_the_first_damping_that_is_enough(self, factor, damping, lowest):
        a = symmetric(np.concatenate([[lowest], np.linspace(0.5, 3, N - 1)]))
        solution = damped_solve(a, B, damping, factor=factor)
        check(a, B, solution)
        assert solution.damping >= max(damping, -lowest * (1 - 1e-9))
        if solution.attempts > 1:
            # The one before it was not.
            assert solution.damping / factor <= -lowest * (1 + 1e-9) or solution.attempts == 2
        if damping and solution.attempts > 1:
            np.testing.assert_allclose(solution.damping, damping * factor ** (solution.attempts - 1), rtol=1e-9)

    def test_a_tiny_share_of_the_matrix_comes_after_zero(self):
        for scale in (1e-20, 1.0, 1e20):
            a = scale * np.diag([-1e-9, 1.0, 2.0])
            solution = damped_solve(a, np.ones(3))
            np.testing.assert_allclose(solution.damping, 2e-9 * scale, rtol=1e-9)
            assert solution.attempts == 3

    @pytest.mark.parametrize("matrix", [np.zeros((3, 3)), -np.eye(3), np.ones((3, 3)) * -1.0], ids=str)
    def test_matrices_that_need_all_of_it(self, matrix):
        solution = damped_solve(matrix, np.ones(3))
        assert solution.damping > 0
        check(matrix, np.ones(3), solution)

    @pytest.mark.parametrize("columns", [2, 5])
    def test_columns_together(self, columns):
        a, b = symmetric(np.linspace(-1, 3, N)), RNG.normal(size=(N, columns))
        check(a, b, damped_solve(a, b))


class TestKinds:
    @pytest.mark.parametrize("shape", [(N,), (N, 2)], ids=str)
    def test_tensors(self, shape):
        a, b = symmetric(np.linspace(-1, 3, N), "float32"), RNG.normal(size=shape).astype("float32")
        expected = damped_solve(a, b)
        for matrix, right in ((tensor(a), tensor(b)), (a, tensor(b)), (tensor(a), b)):
            found = damped_solve(matrix, right)
            assert ops.is_tensor(found.x) == ops.is_tensor(right)
            assert found[1:] == expected[1:]
            np.testing.assert_allclose(ops.convert_to_numpy(found.x), expected.x, rtol=1e-5)
        assert damped_solve(a, tensor(b)).x.dtype == tensor(b).dtype

    def test_integers_have_real_solutions(self):
        for b in (np.array([1, 1]), [1, 1], tensor([1, 1], "int32")):
            found = ops.convert_to_numpy(damped_solve(np.diag([2, 4]), b).x)
            np.testing.assert_allclose(found, [0.5, 0.25])

    def test_half_precision_comes_back_as_it_was(self):
        b = tensor([1.0, 1.0], "bfloat16")
        found = damped_solve(np.diag([2.0, 4.0]), b).x
        assert found.dtype == b.dtype
        np.testing.assert_array_equal(ops.convert_to_numpy(ops.cast(found, "float32")), [0.5, 0.25])

    def test_the_hessian_of_a_trained_classifier(self):
        dense = trained_hessian().dense()
        b = np.random.default_rng(3).normal(size=len(dense)).astype("float32")
        exact = dense.astype("float64")
        lowest = np.linalg.eigvalsh(exact)[0]
        solution = damped_solve(dense, b, 1e-4)
        # A Hessian on the way to a minimum has some negative curvature.
        assert lowest < 0 and solution.damping >= -lowest * (1 - 1e-6)
        x = np.linalg.solve(exact + solution.damping * np.eye(len(b)), b)
        np.testing.assert_allclose(solution.x, x, rtol=1e-5, atol=1e-5 * np.abs(x).max())


class TestErrors:
    @pytest.mark.parametrize(
        "a, b",
        [
            (np.ones((2, 3)), np.ones(2)),
            (np.ones(2), np.ones(2)),
            (np.eye(2), np.ones(3)),
            (np.eye(2), np.ones((2, 2, 2))),
            (np.ones((2, 2, 2)), np.ones(2)),
            (np.eye(2), np.ones((1, 2))),
        ],
        ids=lambda x: str(x.shape),
    )
    def test_shapes(self, a, b):
        with pytest.raises(ValueError, match="^damped_solve expects a matrix of shape \\(n, n\\) and `b` of shape"):
            damped_solve(a, b)

    def test_complex_numbers_are_not_cut(self):
        for a, b in ((np.eye(2) * (1 + 1j), np.ones(2)), (np.eye(2), np.ones(2) * 1j)):
            with pytest.raises(ValueError, match="^damped_solve expects"):
                damped_solve(a, b)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_numbers_that_are_not_finite(self, bad):
        for a, b in ((np.diag([1.0, bad]), np.ones(2)), (np.eye(2), np.array([bad, 1.0]))):
            with pytest.raises(ValueError, match="^damped_solve expects finite numbers"):
                damped_solve(a, b)

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"damping": -1.0}, "0 or more as `damping`. Received: damping=-1.0"),
            ({"damping": np.nan}, "Received: damping=nan"),
            ({"damping": np.inf}, "Received: damping=inf"),
            ({"damping": True}, "Received: damping=True"),
            ({"factor": 1.0}, "above 1 as `factor`. Received: factor=1.0"),
            ({"factor": 0.5}, "Received: factor=0.5"),
            ({"factor": np.inf}, "Received: factor=inf"),
            ({"factor": "ten"}, "Received: factor='ten'"),
        ],
        ids=str,
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match="^damped_solve expects a number.*" + re.escape(message)):
            damped_solve(np.eye(2), np.ones(2), **options)
