"""Sums, multiples and products of operators, and SciPy with them, on quadratic losses whose Hessians are known."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops
from scipy import sparse

import keras_gradtools as kg
from keras_gradtools.curvature import GaussNewton, Hessian
from keras_gradtools.curvature.operators.operator_algebra import MatrixOperator

RNG = np.random.default_rng(5)
D = 4
SIZE = D + 1
SHAPES = [(D, 1), (1,)]
X, Z = (RNG.normal(size=(20, D)).astype("float32") for _ in range(2))
V = RNG.normal(size=SIZE).astype("float32")
VECTORS = RNG.normal(size=(SIZE, 3)).astype("float32")
FULL = RNG.normal(size=(SIZE, SIZE)).astype("float32")
FULL = FULL + FULL.T
BANDED = sparse.diags([np.ones(SIZE - 1), np.arange(SIZE) + 2.0, np.ones(SIZE - 1)], [-1, 0, 1], format="csr")
TRIANGLE = np.triu(np.ones((SIZE, SIZE)))


def of_examples(x):
    """Of the mean squared error of a linear model with a bias: 2 x'x / N, with a column of ones."""
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    return 2 * x.T @ x / len(x)


H, G = of_examples(X), of_examples(Z)


@functools.cache
def model():
    return keras.Sequential([keras.Input((D,)), layers.Dense(1)])


def made(cls, x, **options):
    return cls(model(), "mse", (x, np.zeros((len(x), 1), "float32")), **{"verbose": 0} | options)


@functools.cache
def h():
    return made(Hessian, X)


@functools.cache
def g():
    return made(GaussNewton, Z, batch_size=8)


def scipy_operator(matrix):
    return sparse.linalg.aslinearoperator(np.asarray(matrix))


# What is computed, and its matrix.
COMPUTED = {
    "2h": (lambda: 2 * h(), 2 * H),
    "h 2": (lambda: h() * 2, 2 * H),
    "a number of NumPy": (lambda: np.float64(0.5) * h(), 0.5 * H),
    "h / 4": (lambda: h() / 4, H / 4),
    "-h": (lambda: -h(), -H),
    "h + g": (lambda: h() + g(), H + G),
    "h - g": (lambda: h() - g(), H - G),
    "2h + g": (lambda: 2 * h() + g(), 2 * H + G),
    "of sums": (lambda: 3 * (h() - 2 * g()) - (g() - h()), 4 * H - 7 * G),
    "h g": (lambda: h() @ g(), H @ G),
    "h h": (lambda: h() @ h(), H @ H),
    "g h g": (lambda: g() @ h() @ g(), G @ H @ G),
    "(h + g) h": (lambda: (h() + g()) @ h(), (H + G) @ H),
    "h + g h": (lambda: h() + g() @ h(), H + G @ H),
    "h + array": (lambda: h() + FULL, H + FULL),
    "array + h": (lambda: FULL + h(), H + FULL),
    "h - array": (lambda: h() - FULL, H - FULL),
    "array - h": (lambda: FULL - h(), FULL - H),
    "h + tensor": (lambda: h() + ops.convert_to_tensor(FULL), H + FULL),
    "tensor - h": (lambda: ops.convert_to_tensor(FULL) - h(), FULL - H),
    "h + sparse": (lambda: h() + BANDED, H + BANDED.toarray()),
    "sparse - h": (lambda: BANDED - h(), BANDED.toarray() - H),
    "h sparse": (lambda: h() @ BANDED, H @ BANDED.toarray()),
    "sparse h": (lambda: BANDED @ h(), BANDED.toarray() @ H),
    "h + SciPy": (lambda: h() + scipy_operator(FULL), H + FULL),
    "SciPy + h": (lambda: scipy_operator(FULL) + h(), H + FULL),
    "h SciPy": (lambda: h() @ scipy_operator(TRIANGLE), H @ TRIANGLE),
    "h + triangle": (lambda: h() + TRIANGLE, H + TRIANGLE),
    "linearized": (lambda: h().linearized() + g(), H + G),
}
NESTED = ["2h", "-h", "2h + g", "of sums", "g h g", "h + g h"]


def assert_close(found, desired, rtol=1e-5):
    found = ops.convert_to_numpy(found) if ops.is_tensor(found) else found
    assert np.shape(found) == np.shape(desired)
    np.testing.assert_allclose(found, desired, rtol=0, atol=rtol * np.abs(desired).max())


@pytest.mark.parametrize("name", COMPUTED)
class TestProducts:
    def test_vectors(self, name):
        make, matrix = COMPUTED[name]
        found = make()
        assert found.shape == (SIZE, SIZE) and isinstance(found.dtype, np.dtype)
        assert_close(found @ V, matrix @ V)
        assert_close(found.matvec(V), matrix @ V)
        assert_close(found.matvec(V[:, None]), (matrix @ V)[:, None])
        assert_close(found.rmatvec(V), matrix.T @ V)
        assert_close(found.T @ V, matrix.T @ V)
        assert_close(found.linearized() @ V, matrix @ V)

    def test_matrices(self, name):
        make, matrix = COMPUTED[name]
        if name == "linearized":
            pytest.skip("a linearized operator multiplies vectors")
        found = make()
        assert_close(found @ VECTORS, matrix @ VECTORS)
        assert_close(found.matmat(VECTORS), matrix @ VECTORS)
        assert_close(found.rmatmat(VECTORS), matrix.T @ VECTORS)
        assert_close(found.dense(), matrix)

    def test_tensors(self, name):
        make, matrix = COMPUTED[name]
        if name == "linearized":
            pytest.skip("a linearized operator multiplies NumPy vectors")
        product = make() @ ops.convert_to_tensor(V)
        assert ops.is_tensor(product)
        assert_close(product, matrix @ V)
        assert_close(make().matvec(ops.convert_to_tensor(V[:, None])), (matrix @ V)[:, None])

    def test_symmetry_is_known(self, name):
        make, matrix = COMPUTED[name]
        if "SciPy" in name:
            pytest.skip("a LinearOperator does not tell")
        found, is_symmetric = make(), np.allclose(matrix, matrix.T)
        assert found.is_symmetric == is_symmetric
        assert (found.T is found) == is_symmetric

    def test_the_trace_and_the_diagonal(self, name):
        make, matrix = COMPUTED[name]
        np.testing.assert_allclose(make().trace(SIZE + 1).value, np.trace(matrix), rtol=1e-5)
        assert_close(make().diagonal(SIZE).value, np.diag(matrix))

    def test_eigenvalues(self, name):
        make, matrix = COMPUTED[name]
        if not np.allclose(matrix, matrix.T):
            with pytest.raises(ValueError, match="^eigsh expects a symmetric matrix as `a`. Received: .*h @ g @ h"):
                make().eigsh(2)
            with pytest.raises(ValueError, match="^spectral_density expects a symmetric matrix"):
                make().spectral_density(2, 2)
            with pytest.raises(ValueError, match="^conjugate_gradients expects a symmetric matrix"):
                kg.curvature.conjugate_gradients(make(), V)
            return
        values, vectors = make().eigsh(2, ncv=SIZE)
        np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix)[-2:], rtol=1e-4)
        assert_close(matrix @ vectors, vectors * values, 1e-4)
        density = make().spectral_density(2, SIZE, points=10)
        np.testing.assert_allclose(np.nanmax(density.nodes), np.linalg.eigvalsh(matrix)[-1], rtol=1e-4)


@pytest.mark.parametrize("name", NESTED)
def test_nested_vectors(name):
    make, matrix = COMPUTED[name]
    parts = [V[:D, None], V[D:]]
    for given in (parts, [ops.convert_to_tensor(p) for p in parts]):
        product = make() @ given
        assert type(product) is list and [tuple(p.shape) for p in product] == SHAPES
        assert all(type(p) is type(q) for p, q in zip(product, given, strict=True)) or ops.is_tensor(product[0])
        assert_close(np.concatenate([ops.convert_to_numpy(p).ravel() for p in product]), matrix @ V)


def test_a_sum_is_the_sum_of_the_products():
    np.testing.assert_array_equal((2 * h() + g()) @ V, 2 * (h() @ V) + g() @ V)
    np.testing.assert_array_equal((h() @ g()) @ V, h() @ (g() @ V))


def test_dtypes_are_those_of_numpy():
    assert h().dtype == np.float32 and isinstance(h().dtype, np.dtype)
    assert (2 * h()).dtype == (h() + FULL).dtype == np.float32
    assert (h() + FULL.astype("float64")).dtype == (h() + BANDED).dtype == np.float64
    assert ((h() + FULL.astype("float64")) @ V).dtype == np.float64
    assert (2 * h() @ V).dtype == (np.float64(2) * h() @ V).dtype == np.float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype):
    linear = keras.Sequential([keras.Input((2,)), layers.Dense(1, use_bias=False, dtype=dtype)])
    x = np.array([[1.0, 2.0], [3.0, 4.0]], "float32")
    found = Hessian(linear, "mse", (x, np.zeros((2, 1), "float32")), verbose=0)
    matrix = np.array([[10.0, 14.0], [14.0, 20.0]])
    assert found.dtype == (2 * found).dtype == np.dtype(dtype)
    np.testing.assert_array_equal(np.asarray((2 * found) @ np.ones(2), "float32"), 2 * matrix.sum(axis=0))
    values, _ = (2 * found).eigsh(1)
    assert values.dtype == found.dense().dtype == found.to_scipy().dtype == "float32"
    np.testing.assert_allclose(values, 2 * np.linalg.eigvalsh(matrix)[-1:], rtol=0.02)


def test_conjugate_gradients_of_a_sum():
    found = kg.curvature.conjugate_gradients(h() + 2 * g(), V, damping=0.1, rtol=1e-6, max_iterations=20)
    assert found.reason == "converged"
    assert_close(found.x, np.linalg.solve(H + 2 * G + 0.1 * np.eye(SIZE), V), 1e-4)


def test_a_generalized_trace():
    # What a Fisher matrix is for the covariance of gradients: tr(H^-1 G).
    found = kg.curvature.trace(np.linalg.inv(H) @ G, 6)
    np.testing.assert_allclose(found.value, np.trace(np.linalg.inv(H) @ G), rtol=1e-10)


def test_new_weights_are_seen():
    cubic = keras.Sequential([keras.Input((1,)), layers.Dense(1, use_bias=False, activation=lambda z: z**3)])
    cubic.set_weights([np.ones((1, 1))])
    # The mean squared error w^6 with the second derivative 30 w^4.
    found = Hessian(cubic, "mse", (np.ones((1, 1), "float32"), np.zeros((1, 1), "float32")), verbose=0)
    double = 2 * found
    np.testing.assert_allclose(double @ np.ones(1), [60.0], rtol=1e-5)
    cubic.set_weights([np.full((1, 1), 2.0)])
    np.testing.assert_allclose(double @ np.ones(1), [960.0], rtol=1e-5)


def test_a_bar_is_shown_as_the_operators_say():
    auto, always = made(Hessian, X, verbose="auto"), made(Hessian, X, verbose=1)
    assert (auto + FULL).verbose == (auto @ auto).verbose == "auto"
    assert (auto + always).verbose == (2 * always).verbose == 1
    assert (h() + always).verbose == 0
    assert always.linearized().verbose == 1


class TestSciPy:
    @pytest.mark.parametrize("name", ["h + g", "2h + g", "h + array", "g h g"])
    def test_eigsh(self, name):
        make, matrix = COMPUTED[name]
        values, vectors = sparse.linalg.eigsh(make(), k=2)
        expected = np.linalg.eigvalsh(matrix)
        np.testing.assert_allclose(np.sort(values), expected[np.sort(np.argsort(np.abs(expected))[-2:])], rtol=1e-4)
        assert_close(matrix @ vectors, vectors * values, 1e-4)
        np.testing.assert_allclose(np.sort(values), make().eigsh(2, "LM")[0], rtol=1e-4)

    def test_eigsh_of_a_curvature_operator(self):
        for operator, matrix in ((h(), H), (g(), G)):
            values = sparse.linalg.eigsh(operator, k=2, which="LA", return_eigenvectors=False)
            np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(matrix)[-2:], rtol=1e-4)
            np.testing.assert_allclose(np.sort(values), operator.eigsh(2)[0], rtol=1e-4)

    @pytest.mark.parametrize("name", ["h + g", "h g", "h + triangle"])
    def test_as_linear_operator(self, name):
        make, matrix = COMPUTED[name]
        for found in (sparse.linalg.aslinearoperator(make()), make().to_scipy()):
            assert found.shape == (SIZE, SIZE) and found.dtype == make().dtype
            assert_close(found @ V, matrix @ V)
            assert_close(found @ V[:, None], (matrix @ V)[:, None])
            assert_close(found @ VECTORS, matrix @ VECTORS)
            assert_close(found.T @ V, matrix.T @ V)
            assert_close(found.H @ VECTORS, matrix.T @ VECTORS)

    def test_cg(self):
        solution, info = sparse.linalg.cg(h() + g(), V, rtol=1e-5)
        assert info == 0
        assert_close(solution, np.linalg.solve(H + G, V), 1e-3)


class TestErrors:
    @pytest.mark.parametrize(
        "compute",
        [
            lambda: h() + 3.0,
            lambda: 3.0 - h(),
            lambda: h() + "h",
            lambda: h() + None,
            lambda: h() * V,
            lambda: V * h(),
            lambda: True * h(),
            lambda: 1j * h(),
            lambda: h() / "2",
            lambda: V @ h(),
            lambda: FULL @ h(),
        ],
    )
    def test_other_operands(self, compute):
        with pytest.raises(TypeError):
            compute()

    @pytest.mark.parametrize("wrong", [V, np.ones((SIZE, 2)), 1j * FULL, sparse.csr_array(np.ones((SIZE, 2)))])
    def test_matrices_that_are_none(self, wrong):
        with pytest.raises(ValueError, match="added to, and multiplied by, real square matrices.* Received: a"):
            h() + wrong

    def test_other_shapes(self):
        for compute in (lambda: h() + np.eye(2), lambda: h() @ sparse.eye_array(2), lambda: np.eye(7) - h()):
            with pytest.raises(ValueError, match=r"have the same shape. Received: the shapes \[\("):
                compute()

    @pytest.mark.parametrize("wrong", [np.ones(SIZE + 1), np.ones((SIZE, 2)), np.ones((1, SIZE)), 1.0])
    def test_vectors(self, wrong):
        with pytest.raises(ValueError, match=r"matvec expects a vector of shape \(5,\) or \(5, 1\). Received: "):
            h().matvec(wrong)
        with pytest.raises(ValueError, match=r"^matmat expects a matrix of shape \(5, columns\). Received: "):
            h().matmat(V)

    def test_a_matrix_takes_no_nested_vector(self):
        with pytest.raises(ValueError, match=r"A matrix of shape \(5, 5\) multiplies a vector .* Received: "):
            (h() + FULL) @ [V[:D, None], V[D:]]

    def test_a_sum_has_no_loss(self):
        with pytest.raises(
            ValueError, match="^loss_surface expects a curvature operator, which has a loss. Received: "
        ):
            kg.curvature.loss_surface(h() + g())

    def test_a_dense_matrix_needs_memory(self):
        huge = MatrixOperator(sparse.linalg.aslinearoperator(sparse.eye_array(10**7)))
        with pytest.raises(MemoryError, match="The matrix of this MatrixOperator"):
            huge.dense()
