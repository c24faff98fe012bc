"""The Cholesky solution against the equation that it solves."""

import sys

import numpy as np
import pytest

import keras_gradtools as kg
from keras_gradtools.curvature.solvers.cholesky import cholesky_solve

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("n", [0, 1, 2, 150])
@pytest.mark.parametrize("columns", [(), (1,), (3,)])
def test_solves_the_equation(n, columns):
    root, b = RNG.normal(size=(n, n)), RNG.normal(size=(n, *columns))
    matrix = root @ root.T + np.eye(n)
    kept = b.copy()
    x = cholesky_solve(np.tril(matrix), b)
    np.testing.assert_allclose(matrix @ x, b, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(b, kept)
    assert x.shape == b.shape and x.dtype == "float64"


def test_entries_of_very_different_size():
    scale = np.geomspace(1e-150, 1e150, 40)
    matrix = np.diag(scale)
    matrix[1:, 0] = 1e-160
    np.testing.assert_allclose(cholesky_solve(matrix, scale), 1.0)


@pytest.mark.parametrize("matrix", [-np.eye(2), np.zeros((2, 2)), np.array([[1.0, 2.0], [2.0, 1.0]])])
def test_a_matrix_that_is_not_positive_definite(matrix):
    with pytest.raises(np.linalg.LinAlgError):
        cholesky_solve(matrix, np.ones(2))


def test_no_solver_needs_scipy(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "scipy"]:
        monkeypatch.setitem(sys.modules, name, None)
    np.testing.assert_allclose(kg.curvature.damped_solve(np.diag([2.0, 4.0]), np.array([2.0, 2.0])).x, [1.0, 0.5])
