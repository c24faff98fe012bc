"""The Hessian, the Gauss-Newton and the Fisher matrix: their products, and the model that they leave alone."""

import functools
import itertools
import random
import sys

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.curvature import Fisher, GaussNewton, Hessian
from tests.compilers import compiled_by
from tests.curvature.reference import (
    DTYPES,
    QUIET,
    REFERENCES,
    SHAPES,
    SIZE,
    THETA,
    TOLERANCE,
    D,
    K,
    N,
    T,
    V,
    W,
    X,
    Y,
    assert_close,
    assert_is,
    cross_entropies,
    curvature_of_cross_entropies,
    curvature_of_squares,
    gauss_newton_reference,
    hessian,
    hessian_reference,
    jacobian,
    linear,
    loss_of,
    matrix_of,
    mlp,
    of_linear,
    operator,
    split,
)

# --- the matrix ---


@pytest.mark.parametrize("loss", ["cross-entropy", "mse"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_hessian_of_an_mlp(loss, dtype):
    found = operator("Hessian", loss, dtype)
    dense = found.dense()
    assert dense.dtype == found.dtype == dtype and found.shape == (SIZE, SIZE)
    assert_close(dense, hessian_reference(loss), {"float32": 1e-5, "float64": 1e-9}[dtype])
    assert np.array_equal(dense, dense.T)
    assert_close(matrix_of(found), dense, TOLERANCE[dtype])
    assert_close(found @ V.astype(dtype), dense @ V, TOLERANCE[dtype])


# As many as a power of two, since Keras divides by the size of a batch in single precision on torch.
EVEN = X[:32]


class Native(layers.Layer):
    """A layer that computes with the operators of the framework, in the precision of its weights on every backend."""

    def build(self, shape):
        self.inner = self.add_weight(shape=(D, W), name="inner")
        self.outer = self.add_weight(shape=(W, K), name="outer")

    def call(self, x):
        z = x @ self.inner.value
        return (z / (1.0 + z * z) ** 0.5) @ self.outer.value


def native(theta):
    """What `Native` computes, in NumPy."""
    inner, outer = split(theta, [(D, W), (W, K)])
    z = EVEN.astype("float64") @ inner
    return (z / np.sqrt(1.0 + z * z)) @ outer


class Squares(keras.losses.Loss):
    """The mean squared error, by a sum: Keras' means are in single precision on JAX and torch."""

    def call(self, y, z):
        return ops.sum((y - z) ** 2, axis=-1) / K


@pytest.mark.float64
@pytest.mark.parametrize("kind", ["Hessian", "GaussNewton", "empirical"])
def test_double_precision(kind):
    model = keras.Sequential([keras.Input((D,), dtype="float64"), Native(dtype="float64")])
    theta = 0.5 * np.random.default_rng(4).normal(size=(D + K) * W)
    model.set_weights(split(theta, [(D, W), (W, K)]))
    cls = {"Hessian": Hessian, "GaussNewton": GaussNewton}.get(kind, Fisher)
    options = {"kind": "empirical"} if kind == "empirical" else {}
    data = EVEN.astype("float64"), T[:32].astype("float64")
    found = cls(model, Squares(dtype="float64"), data, batch_size=8, **QUIET, **options)

    def losses(theta):
        return ((native(theta) - T[:32]) ** 2).mean(axis=-1)

    if kind == "Hessian":
        expected = hessian(lambda theta: losses(theta).mean(), theta)
    elif kind == "empirical":
        g = jacobian(losses, theta)
        expected = g.T @ g / 32
    else:
        j = jacobian(native, theta)
        expected = 2 / K * np.einsum("nka,nkb->ab", j, j) / 32
    dense = found.dense()
    assert dense.dtype == found.dtype == "float64"
    assert_close(dense, expected, 1e-9 if kind == "Hessian" else 1e-10)
    v = np.random.default_rng(5).normal(size=(len(theta), 3))
    assert_close(found @ v, dense @ v, 1e-10)
    assert_close(found @ v[:, 0], dense @ v[:, 0], 1e-10)


@pytest.mark.parametrize("kind", ["GaussNewton", "Fisher", "empirical"])
@pytest.mark.parametrize("loss", ["cross-entropy", "mse"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_other_matrices_of_an_mlp(kind, loss, dtype):
    found = operator(kind, loss, dtype)
    if loss == "mse":
        assert_is(found, REFERENCES[kind](loss), TOLERANCE[dtype])
        return
    matrix = matrix_of(found)
    assert matrix.dtype == dtype
    assert_close(matrix, REFERENCES[kind](loss), TOLERANCE[dtype])
    assert_close(found @ V.astype(dtype), matrix @ V.astype(dtype), TOLERANCE[dtype])
    assert_close(matrix, matrix.T, TOLERANCE[dtype])
    assert np.linalg.eigvalsh(matrix)[0] > -TOLERANCE[dtype] * np.abs(matrix).max()


@pytest.mark.parametrize("kind", ["GaussNewton", "Fisher", "empirical"])
def test_dense_and_blocks(kind):
    found = operator(kind)
    dense = found.dense(chunk_size=5)
    assert_close(dense, REFERENCES[kind]("cross-entropy"))
    assert np.array_equal(dense, dense.T) and type(dense) is np.ndarray


def test_the_blocks_are_those_of_hessian():
    model = mlp()

    def loss(weights):
        z, _ = model.stateless_call(weights, [], ops.convert_to_tensor(X))
        return loss_of("cross-entropy")(Y, z)

    expected = kg.hessian(loss)([ops.convert_to_tensor(w) for w in model.get_weights()])
    found = operator("Hessian").blocks()
    for i, j in itertools.product(range(4), repeat=2):
        assert found[i][j].shape == SHAPES[i] + SHAPES[j] and type(found[i][j]) is np.ndarray
        np.testing.assert_allclose(found[i][j], ops.convert_to_numpy(expected[i][j]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch_size", [256, 10])
@pytest.mark.parametrize("kind", ["Hessian", "GaussNewton", "Fisher", "empirical"])
def test_the_linearized_products(kind, batch_size):
    found = operator(kind, batch_size=batch_size)
    linearized, matrix = found.linearized(), REFERENCES[kind]("cross-entropy")
    assert linearized.shape == found.shape
    for v in (V, -2 * V[::-1].astype("float64"), [1.0] + [0.0] * (SIZE - 1)):
        product = linearized @ v
        assert type(product) is np.ndarray and product.dtype == "float32"
        assert_close(product, matrix @ np.asarray(v))


def test_a_linearized_product_of_another_shape_is_refused():
    linearized = operator("Hessian").linearized()
    for wrong in (np.ones((SIZE, 2), "float32"), np.ones(SIZE + 1, "float32"), 1.0):
        with pytest.raises(ValueError, match=rf"a NumPy vector of shape \({SIZE},\). Received: .*The operator itself"):
            linearized @ wrong


def test_attributes():
    found = operator("Hessian")
    assert found.model is mlp() and found.shape == (SIZE, SIZE) and found.dtype == "float32"
    assert [v.path for v in found.variables] == [v.path for v in mlp().trainable_variables]
    assert found.slices == [slice(0, 12), slice(12, 16), slice(16, 28), slice(28, 31)]
    assert repr(found).startswith("<Hessian of ") and "shape (31, 31), dtype float32" in repr(found)


# --- the vectors ---


def flat_of(parts):
    return np.concatenate([ops.convert_to_numpy(p).reshape(-1) for p in parts])


class TestProductsInKind:
    EXPECTED = property(lambda self: hessian_reference("cross-entropy") @ V)

    def test_an_array(self):
        found = operator("Hessian") @ V
        assert type(found) is np.ndarray and found.dtype == "float32"
        assert_close(found, self.EXPECTED)

    @pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "bool"])
    def test_an_array_of_another_dtype(self, dtype):
        v = (4 * V).astype(dtype)
        found = operator("Hessian") @ v
        assert type(found) is np.ndarray and found.dtype == "float32"
        assert_close(found, hessian_reference("cross-entropy") @ v.astype("float64"))

    def test_a_tensor(self):
        found = operator("Hessian") @ ops.convert_to_tensor(V)
        assert ops.is_tensor(found)
        assert_close(found, self.EXPECTED)

    def test_a_variable(self):
        found = operator("Hessian") @ keras.Variable(V)
        assert ops.is_tensor(found)
        assert_close(found, self.EXPECTED)

    def test_a_list_of_numbers(self):
        found = operator("Hessian") @ [float(x) for x in V]
        assert type(found) is np.ndarray
        assert_close(found, self.EXPECTED)

    @pytest.mark.parametrize("columns", [1, 64, 65, 150])
    def test_a_matrix(self, columns):
        vectors = np.random.default_rng(columns).normal(size=(SIZE, columns)).astype("float32")
        found = operator("Hessian") @ vectors
        assert type(found) is np.ndarray
        assert_close(found, hessian_reference("cross-entropy") @ vectors)

    def test_a_matrix_without_columns(self):
        found = operator("Hessian") @ np.zeros((SIZE, 0))
        assert type(found) is np.ndarray and found.shape == (SIZE, 0)

    def test_a_tensor_of_columns(self):
        vectors = np.stack([V, 2 * V, -V], axis=1)
        found = operator("Hessian") @ ops.convert_to_tensor(vectors)
        assert ops.is_tensor(found)
        assert_close(found, hessian_reference("cross-entropy") @ vectors)

    def test_a_list_of_tensors(self):
        found = operator("Hessian") @ [ops.convert_to_tensor(part) for part in split(V)]
        assert type(found) is list and all(map(ops.is_tensor, found))
        assert [tuple(p.shape) for p in found] == SHAPES
        assert_close(flat_of(found), self.EXPECTED)

    def test_a_list_of_arrays(self):
        found = operator("Hessian") @ split(V)
        assert type(found) is list and all(type(p) is np.ndarray for p in found)
        assert [p.shape for p in found] == SHAPES
        assert_close(flat_of(found), self.EXPECTED)

    def test_a_list_of_variables(self):
        # The weights themselves, as a direction.
        found = operator("Hessian") @ mlp().trainable_variables
        assert type(found) is list
        assert_close(flat_of(found), hessian_reference("cross-entropy") @ THETA)

    def test_a_list_of_numbers_for_variables_of_one_element(self):
        # As many numbers as there are elements are a flat vector, even if there are as many variables.
        model = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
        found = Hessian(model, "mse", (np.array([[3.0]], "float32"), np.zeros((1, 1), "float32")), **QUIET)
        np.testing.assert_allclose(found @ [1.0, 0.0], [18, 6], rtol=1e-6)

    def test_an_array_from_the_left_is_refused(self):
        with pytest.raises(TypeError):
            V @ operator("Hessian")


class TestVariables:
    def assert_is_part(self, variables, place, in_order=None):
        found = Hessian(mlp(), loss_of("cross-entropy"), (X, Y), variables, **QUIET)
        expected = hessian_reference("cross-entropy")[np.ix_(place, place)]
        assert_is(found, expected)
        return found

    def test_a_layer(self):
        found = self.assert_is_part(mlp().layers[1], range(16, 31))
        assert found.slices == [slice(0, 12), slice(12, 15)]
        assert [p.shape for p in found @ [np.ones((W, K)), np.ones(K)]] == [(W, K), (K,)]

    def test_a_list_in_another_order(self):
        _, b1, _, b2 = mlp().trainable_variables
        found = self.assert_is_part([b2, b1], [28, 29, 30, 12, 13, 14, 15])
        assert [v is w for v, w in zip(found.variables, [b2, b1], strict=True)] == [True, True]

    def test_one_variable(self):
        found = self.assert_is_part(mlp().layers[1].kernel, range(16, 28))
        assert found.blocks().shape == (W, K, W, K)
        vector = V[16:28]
        expected = hessian_reference("cross-entropy")[16:28, 16:28] @ vector
        assert_close(found @ vector, expected)
        (product,) = found @ [vector.reshape(W, K)] if isinstance(found.blocks(), list) else (found @ vector,)
        assert_close(product, expected)

    def test_a_dict(self):
        _, b1, _, b2 = mlp().trainable_variables
        found = self.assert_is_part({"z": b1, "a": b2}, [28, 29, 30, 12, 13, 14, 15])
        vector = {"z": V[12:16], "a": V[28:31]}
        product = found @ vector
        place = [28, 29, 30, 12, 13, 14, 15]
        expected = hessian_reference("cross-entropy")[np.ix_(place, place)] @ V[place]
        assert list(product) == ["z", "a"] and type(product["a"]) is np.ndarray
        assert_close(np.concatenate([product["a"], product["z"]]), expected)
        blocks = found.blocks()
        assert blocks["z"]["a"].shape == (W, K)
        assert_close(blocks["z"]["a"], hessian_reference("cross-entropy")[12:16, 28:31], 1e-4)

    @pytest.mark.parametrize("cls", [GaussNewton, Fisher])
    def test_of_the_others(self, cls):
        found = cls(mlp(), loss_of("cross-entropy"), (X, Y), mlp().layers[1], **QUIET)
        assert_close(found.dense(), gauss_newton_reference("cross-entropy")[16:, 16:])


# --- the model and its state ---


def test_the_compiled_loss():
    model = mlp()
    model.compile(loss=loss_of("cross-entropy"))
    for cls in (Hessian, GaussNewton, Fisher):
        found = cls(model, None, (X, Y), **QUIET)
        assert_close(found @ V, REFERENCES[cls.__name__]("cross-entropy") @ V)


def test_a_wrapper_stands_for_its_model():
    wrapper = kg.models.InputGradientRegularized(mlp(), 0.1)
    wrapper.compile(loss=loss_of("cross-entropy"))
    # What the wrapped one was compiled with, if it was, is not what is trained.
    for loss in (None, loss_of("cross-entropy")):
        found = Hessian(wrapper, loss, (X, Y), **QUIET)
        assert found.model is mlp()
        assert_close(found @ V, hessian_reference("cross-entropy") @ V)


def test_new_weights_are_seen():
    model = linear(K)
    found = Hessian(model, loss_of("cross-entropy"), (X, Y), **QUIET)
    for scale in (1, 2, -0.5):
        kernel = scale * np.linspace(-1, 1, D * K, dtype="float32").reshape(D, K)
        model.set_weights([kernel])
        expected = of_linear(X, curvature_of_cross_entropies(X @ kernel.astype("float64")))
        assert_close(found.dense(), expected)
        assert_is(found, expected)


def test_weights_after_training_are_seen():
    model = linear(K)
    model.compile("sgd", loss_of("cross-entropy"))
    found = Hessian(model, None, (X, Y), **QUIET)
    before = found @ V[: D * K]
    model.fit(X, Y, epochs=5, verbose=0)
    expected = of_linear(X, curvature_of_cross_entropies(X @ model.get_weights()[0].astype("float64")))
    assert np.abs(expected @ V[: D * K] - before).max() > 1e-3
    assert_is(found, expected)


def test_a_layer_is_a_model():
    layer = layers.Dense(K, use_bias=False)
    layer.build((None, D))
    expected = of_linear(X, curvature_of_cross_entropies(X @ ops.convert_to_numpy(layer.kernel).astype("float64")))
    assert_is(Hessian(layer, loss_of("cross-entropy"), (X, Y), **QUIET), expected)


class TestTraining:
    def test_dropout_is_replayed(self):
        # A copy of the layer, with a seed of the same state, drops the same elements.
        dropped = ops.convert_to_numpy(layers.Dropout(0.5, seed=7)(X, training=True)).astype("float64")
        assert 0.2 < (dropped == 0).mean() < 0.8
        model = keras.Sequential([keras.Input((D,)), layers.Dropout(0.5, seed=7), layers.Dense(1, use_bias=False)])
        for cls in (Hessian, GaussNewton, Fisher):
            found = cls(model, "mse", (X, T[:, :1]), training=True, **QUIET)
            assert_is(found, 2 * dropped.T @ dropped / N)
            assert np.array_equal(found @ V[:D], found @ V[:D])
            assert_is(cls(model, "mse", (X, T[:, :1]), **QUIET), 2 * X.T.astype("float64") @ X / N)

    @pytest.mark.parametrize("cls", [Hessian, GaussNewton])
    @pytest.mark.parametrize("training", [True, False])
    def test_batch_normalization(self, cls, training):
        model = normalized()

        def network(theta):
            gamma, beta, kernel = split(theta, [(D,), (D,), (D, K)])
            mean, variance = (X.mean(axis=0), X.var(axis=0)) if training else (np.zeros(D), np.ones(D))
            return ((X - mean) / np.sqrt(variance + 1e-3) * gamma + beta) @ kernel

        theta = np.concatenate([ops.convert_to_numpy(v).reshape(-1) for v in model.trainable_variables])
        if cls is Hessian:
            expected = hessian(lambda theta: cross_entropies(network(theta)).mean(), theta)
        else:
            j = jacobian(network, theta)
            expected = np.einsum("nka,nkl,nlb->ab", j, curvature_of_cross_entropies(network(theta)), j) / N
        found = cls(model, loss_of("cross-entropy"), (X, Y), training=training, **QUIET)
        assert_is(found, expected, 2e-5)


@functools.cache
def normalized():
    model = keras.Sequential([keras.Input((D,)), layers.BatchNormalization(), layers.Dense(K, use_bias=False)])
    weights = [1 + 0.1 * np.arange(D), 0.2 * np.arange(D), np.linspace(-1, 1, D * K).reshape(D, K)]
    for v, w in zip(model.trainable_variables, weights, strict=True):
        v.assign(w)
    return model


class Noise(layers.Layer):
    """Draws from Keras' own seed, as what is given none does."""

    def call(self, x, training=None):
        return x + 0.1 * keras.random.normal(ops.shape(x)) if training else x


def with_much_state():
    layer = layers.Dense(
        K, kernel_regularizer="l2", activity_regularizer=keras.regularizers.L2(0.1), use_bias=False, name="last"
    )
    return keras.Sequential(
        [
            keras.Input((D,)),
            layers.Dropout(0.5),
            layers.GaussianNoise(0.1),
            layers.BatchNormalization(),
            layers.SpectralNormalization(layers.Dense(4)),
            layer,
        ]
    )


def use(operator):
    n = operator.shape[0]
    first = operator @ np.ones(n)
    assert np.array_equal(operator @ np.ones(n), first)
    operator.trace(matvecs=6)
    operator.eigsh(k=1, max_restarts=1, tol=1.0)


@pytest.mark.parametrize("cls", [Hessian, pytest.param(GaussNewton, marks=pytest.mark.slow), Fisher])
def test_nothing_in_the_model_changes(cls):
    model = with_much_state()
    model(X, training=True)
    options = {"kind": "monte_carlo"} if cls is Fisher else {}
    state = [ops.convert_to_numpy(v).copy() for v in model.variables]
    losses = [float(loss) for loss in model.losses]
    assert len(losses) == 2 and len(state) > len(model.weights)
    # Batches of one size, which take one program.
    use(cls(model, loss_of("cross-entropy"), (X[:30], Y[:30]), training=True, batch_size=15, **QUIET, **options))
    for variable, before in zip(model.variables, state, strict=True):
        assert np.array_equal(ops.convert_to_numpy(variable), before), variable.path
    assert [float(loss) for loss in model.losses] == losses


def test_no_global_seed_changes():
    def draws():
        own = [ops.convert_to_numpy(keras.random.uniform((2,))).tolist()]
        # A layer without a seed has its own from Python's generator.
        own.append(ops.convert_to_numpy(layers.Dropout(0.5).seed_generator.state).tolist())
        return [
            *own,
            random.random(),
            np.random.random(),
            ops.convert_to_numpy(layers.Dropout(0.5)(X, training=True)).tolist(),
        ]

    model = keras.Sequential([keras.Input((D,)), Noise(), layers.Dropout(0.5), layers.Dense(K, use_bias=False)])
    kinds = [(Hessian, {}), (GaussNewton, {}), (Fisher, {"kind": "monte_carlo"}), (Fisher, {"kind": "empirical"})]
    keras.utils.set_random_seed(4)
    expected = draws()
    keras.utils.set_random_seed(4)
    for cls, options in kinds:
        use(cls(model, loss_of("cross-entropy"), (X, Y), training=True, **QUIET, **options))
    assert draws() == expected


# --- programs ---


@pytest.mark.parametrize("cls", [Hessian, GaussNewton])
def test_nothing_is_traced_again(cls):
    calls = []

    def counted(y_true, y_pred):
        calls.append(None)
        return ops.mean((y_true - y_pred) ** 2, axis=-1)

    model = linear(K)
    found = cls(model, counted, (X, T), batch_size=10, **QUIET)
    expected = compiled_by(lambda: found @ np.ones(D * K))
    traced = len(calls)
    assert traced > 0
    for _ in range(3):
        np.testing.assert_array_equal(found @ np.ones(D * K), expected)
    found @ ops.ones(D * K)
    model.set_weights([2 * w for w in model.get_weights()])
    found @ np.arange(D * K)
    assert len(calls) == traced
    # One more for a stack of columns, the next of them none.
    compiled_by(lambda: found @ np.eye(D * K))
    traced = len(calls)
    found @ np.eye(D * K)
    assert len(calls) == traced
    assert_close(found @ np.eye(D * K), of_linear(X, curvature_of_squares(X)))


# --- SciPy ---


class TestSciPy:
    linalg = property(lambda self: pytest.importorskip("scipy.sparse.linalg"))

    def test_without_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "scipy.sparse", None)
        with pytest.raises(ImportError, match=r'`to_scipy` needs SciPy: pip install "keras-gradtools\[solvers\]"'):
            operator("Hessian").to_scipy()

    def test_eigsh(self):
        found = operator("Hessian").to_scipy()
        assert found.shape == (SIZE, SIZE) and found.dtype == "float32"
        expected = np.linalg.eigvalsh(hessian_reference("cross-entropy"))
        values = self.linalg.eigsh(found, k=3, which="LA", return_eigenvectors=False)
        np.testing.assert_allclose(np.sort(values), expected[-3:], rtol=1e-4)
        values = self.linalg.eigsh(found, k=2, which="SA", return_eigenvectors=False)
        np.testing.assert_allclose(np.sort(values), expected[:2], rtol=1e-3)

    def test_cg(self):
        matrix = gauss_newton_reference("cross-entropy") + 0.1 * np.eye(SIZE)
        damped = operator("GaussNewton").to_scipy() + self.linalg.aslinearoperator(0.1 * np.eye(SIZE, dtype="float32"))
        solution, info = self.linalg.cg(damped, V, rtol=1e-5)
        assert info == 0
        np.testing.assert_allclose(solution, np.linalg.solve(matrix, V), rtol=1e-2, atol=1e-2)

    def test_products(self):
        found, expected = operator("Hessian").to_scipy(), hessian_reference("cross-entropy")
        vectors = np.stack([V, -2 * V], axis=1)
        for product, desired in [
            (found.matvec(V), expected @ V),
            (found.matvec(V[:, None]), (expected @ V)[:, None]),
            (found.rmatvec(V), expected @ V),
            (found.matmat(vectors), expected @ vectors),
            (found.T @ vectors, expected @ vectors),
            (found.H @ V, expected @ V),
        ]:
            assert_close(product, desired)
