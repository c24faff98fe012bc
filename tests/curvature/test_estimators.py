"""The estimators on any matrix: arrays, tensors, sparse matrices, operators of SciPy, and what has only products."""

import keras
import numpy as np
import pytest
from keras import ops
from scipy import sparse

import keras_gradtools as kg
from tests.curvature.test_eigenvalues import Known, symmetric, trained_hessian

N = 30
SPECTRUM = np.linspace(-2.0, 5.0, N)
A = symmetric(SPECTRUM)
DENSITY = {"points": 20, "width": 0.3}
MATRICES = {
    "array": lambda: A,
    "tensor": lambda: ops.convert_to_tensor(A, dtype="float32"),
    "variable": lambda: keras.Variable(A, dtype="float32"),
    "sparse": lambda: sparse.csr_array(A),
    "sparse matrix": lambda: sparse.csc_matrix(A),
    "matrix": lambda: np.matrix(A),
    "SciPy": lambda: sparse.linalg.aslinearoperator(A),
    "products": lambda: Known(N, A.__matmul__),
    "integers": lambda: np.diag(np.arange(N)),
}


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@pytest.mark.parametrize("name", MATRICES)
class TestOfAnyMatrix:
    def test_eigenvalues(self, name):
        a = MATRICES[name]()
        expected = np.arange(N) if name == "integers" else SPECTRUM
        for which, places in (("LA", slice(N - 2, N)), ("SA", slice(0, 2))):
            values, vectors = kg.curvature.eigsh(a, 2, which)
            np.testing.assert_allclose(values, expected[places], atol=1e-4)
            assert vectors.shape == (N, 2)
            assert values.dtype == vectors.dtype == ("float32" if name in ("tensor", "variable") else "float64")

    def test_the_trace_and_the_diagonal(self, name):
        a = MATRICES[name]()
        dense = np.diag(np.arange(N)) if name == "integers" else A
        np.testing.assert_allclose(kg.curvature.trace(a, N).value, np.trace(dense), rtol=1e-5)
        np.testing.assert_allclose(kg.curvature.diagonal(a, N).value, np.diag(dense), atol=1e-5)
        estimate = kg.curvature.trace(a, 15)
        assert abs(estimate.value - np.trace(dense)) < 4 * estimate.standard_error

    def test_the_density(self, name):
        a = MATRICES[name]()
        if name == "integers":
            a = np.diag([0, 0, 3])
            nodes = kg.curvature.spectral_density(a, 2, 3, **DENSITY).nodes
            np.testing.assert_allclose(nodes[:, :2], [[0, 3], [0, 3]], atol=1e-10)
            return
        found = kg.curvature.spectral_density(a, 3, 8, **DENSITY)
        expected = kg.curvature.spectral_density(A.astype(found.grid.dtype), 3, 8, **DENSITY)
        if name not in ("tensor", "variable"):
            np.testing.assert_allclose(found.density, expected.density, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose((np.diff(found.grid)[0] * found.density).sum(), 1, rtol=0.1)

    def test_conjugate_gradients(self, name):
        a, b = MATRICES[name](), np.ones(N)
        dense = np.diag(np.arange(N)) if name == "integers" else A
        found = kg.curvature.conjugate_gradients(a, b, damping=3.0, rtol=1e-6, max_iterations=100)
        assert found.reason == "converged"
        np.testing.assert_allclose(found.x, np.linalg.solve(dense + 3 * np.eye(N), b), rtol=1e-3, atol=1e-4)


def test_the_methods_are_the_functions():
    hessian = trained_hessian()
    for method, function, args in [
        (hessian.trace, kg.curvature.trace, (12, "hutch++", 3)),
        (hessian.trace, kg.curvature.trace, (9, "hutchinson")),
        (hessian.diagonal, kg.curvature.diagonal, (5, 3)),
        (hessian.eigsh, kg.curvature.eigsh, (2, "LM")),
        (hessian.spectral_density, kg.curvature.spectral_density, (2, 4)),
        (hessian.loss_surface, kg.curvature.loss_surface, (np.eye(56, 2, dtype="float32"), 0.5, 3)),
    ]:
        for one, other in zip(method(*args), function(hessian, *args), strict=True):
            np.testing.assert_array_equal(one, other)


def test_an_operator_is_estimated_as_its_dense_matrix():
    hessian = trained_hessian()
    dense = hessian.dense()
    of_operator, of_matrix = (kg.curvature.trace(a, 20, seed=2) for a in (hessian, dense))
    np.testing.assert_allclose(of_operator, of_matrix, rtol=1e-3)
    of_operator, of_matrix = (kg.curvature.diagonal(a, 20, seed=2) for a in (hessian, dense))
    np.testing.assert_allclose(of_operator.value, of_matrix.value, atol=1e-4 * np.abs(dense).max())
    of_operator, of_matrix = (kg.curvature.eigsh(a, 2)[0] for a in (hessian, hessian.linearized()))
    np.testing.assert_allclose(of_operator, of_matrix, rtol=1e-5)


def test_of_a_matrix_that_is_not_symmetric():
    a = np.random.default_rng(0).normal(size=(N, N))
    for matrix in (a, sparse.csr_array(a), ops.convert_to_tensor(a)):
        for estimate in (
            lambda m: kg.curvature.eigsh(m, 2),
            kg.curvature.spectral_density,
            lambda m: kg.curvature.conjugate_gradients(m, np.ones(N)),
        ):
            with pytest.raises(
                ValueError, match=r" expects a symmetric matrix as `a`. Received: .*0.5 \* \(a \+ a.T\)"
            ):
                estimate(matrix)
    # Traces and diagonals need no symmetry.
    np.testing.assert_allclose(kg.curvature.trace(a, N).value, np.trace(a))
    np.testing.assert_allclose(kg.curvature.diagonal(a, N).value, np.diag(a))
    found = [kg.curvature.trace(a, 20, seed=seed) for seed in range(100)]
    values = np.array([f.value for f in found])
    assert abs(values.mean() - np.trace(a)) < 4 * values.std() / 10


def test_rounding_is_not_taken_for_asymmetry():
    a = A.astype("float32")
    a[0, 1] *= 1 + 1e-5
    np.testing.assert_allclose(kg.curvature.eigsh(a, 1)[0], [5.0], rtol=1e-4)


def test_numbers_that_are_not_finite_are_found_by_the_products():
    for bad in (np.nan, np.inf):
        with pytest.raises(FloatingPointError, match="not finite"):
            kg.curvature.eigsh(np.diag([1.0, bad, 2.0]), 1)


@pytest.mark.parametrize(
    "wrong", [np.ones((2, 3)), np.ones(4), np.zeros((0, 0)), 1j * np.eye(3), np.array([["a"]]), [[1.0]], None, 3.0]
)
def test_what_is_no_matrix(wrong):
    for name in ("trace", "diagonal", "eigsh", "spectral_density"):
        with pytest.raises(ValueError, match=f"^{name} expects as `a` a .*matrix, or an object with .*Received: "):
            getattr(kg.curvature, name)(wrong)


def test_no_bar_for_an_array(capsys):
    kg.curvature.eigsh(A, 2)
    assert capsys.readouterr().out == ""
