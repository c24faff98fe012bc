"""The Hessian, the Gauss-Newton and the Fisher matrix of small models, against central differences and closed forms.

The references are computed in NumPy, in double precision, out of a forward pass written by hand: first derivatives by
complex steps, which are exact, and second ones by central differences of these.
"""

import functools
import itertools
import random

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.curvature import Fisher, GaussNewton, Hessian

RNG = np.random.default_rng(3)
N, D, W, K = 37, 3, 4, 3
SHAPES = [(D, W), (W,), (W, K), (K,)]
SIZE = sum(int(np.prod(shape)) for shape in SHAPES)
# In single precision, so that models of both precisions are the same.
X = RNG.normal(size=(N, D)).astype("float32")
Y = RNG.integers(0, K, N)
T = RNG.normal(size=(N, K)).astype("float32")
B = RNG.integers(0, 2, (N, K)).astype("float32")
SAMPLE_WEIGHT = RNG.uniform(0.2, 2.0, N).astype("float32")
THETA = RNG.normal(scale=0.7, size=SIZE).astype("float32")
V = RNG.normal(size=SIZE).astype("float32")
QUIET = {"verbose": 0}
DTYPES = ["float32", pytest.param("float64", marks=pytest.mark.float64)]
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


# --- the references ---


def split(theta, shapes=SHAPES):
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(np.split(theta, ends[:-1]), shapes, strict=True)]


def forward(theta, x=X):
    w1, b1, w2, b2 = split(theta)
    return np.tanh(x @ w1 + b1) @ w2 + b2


def cross_entropies(z, y=Y):
    return np.log(np.exp(z).sum(axis=-1)) - np.take_along_axis(z, y[..., None], axis=-1)[..., 0]


def squares(z):
    return ((z - T) ** 2).mean(axis=-1)


def jacobian(fun, theta):
    """The Jacobian of `fun`, of shape `(*out, n)`, by complex steps."""
    steps = np.asarray(theta, "float64") + 1e-30j * np.eye(len(theta))
    return np.stack([fun(step).imag for step in steps], axis=-1) / 1e-30


def hessian(fun, theta, eps=1e-5):
    theta = np.asarray(theta, "float64")
    above = [jacobian(fun, theta + e) for e in eps * np.eye(len(theta))]
    below = [jacobian(fun, theta - e) for e in eps * np.eye(len(theta))]
    return (np.stack(above) - np.stack(below)) / (2 * eps)


def softmax(z):
    p = np.exp(z - z.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def curvature_of_cross_entropies(z):
    p = softmax(z)
    return p[..., None] * np.eye(p.shape[-1]) - p[..., :, None] * p[..., None, :]


def curvature_of_squares(z):
    return np.broadcast_to(2 / K * np.eye(K), (len(z), K, K))


VALUES = {"cross-entropy": cross_entropies, "mse": squares}
CURVATURES = {"cross-entropy": curvature_of_cross_entropies, "mse": curvature_of_squares}


def mean_loss(loss, theta, weight=1.0, network=forward):
    return (weight * VALUES[loss](network(theta))).mean()


@functools.cache
def hessian_reference(loss, is_weighted=False):
    return hessian(functools.partial(mean_loss, loss, weight=SAMPLE_WEIGHT if is_weighted else 1.0), THETA)


@functools.cache
def gauss_newton_reference(loss, is_weighted=False):
    weight = SAMPLE_WEIGHT if is_weighted else np.ones(N)
    j = jacobian(forward, THETA)
    return np.einsum("n,nka,nkl,nlb->ab", weight, j, CURVATURES[loss](forward(THETA.astype("float64"))), j) / N


@functools.cache
def empirical_reference(loss, is_weighted=False):
    g = jacobian(lambda theta: VALUES[loss](forward(theta)), THETA)
    return np.einsum("n,na,nb->ab", SAMPLE_WEIGHT if is_weighted else np.ones(N), g, g) / N


REFERENCES = {
    "Hessian": hessian_reference,
    "GaussNewton": gauss_newton_reference,
    "Fisher": gauss_newton_reference,
    "empirical": empirical_reference,
}


def assert_close(found, desired, tolerance=1e-5):
    """Relative to the largest element, as sums of products round."""
    found = ops.convert_to_numpy(found) if ops.is_tensor(found) else found
    assert found.shape == np.shape(desired)
    np.testing.assert_allclose(found.astype("float64"), desired, rtol=0, atol=tolerance * np.abs(desired).max())


# --- the operators ---


# What is compiled is kept with the model, by the loss: most of the time would go there.
def mlp(dtype="float32", activation=None, l2=None):
    return _mlp(dtype, activation, l2)


@functools.cache
def _mlp(dtype, activation, l2):
    if dtype == "float64" and keras.config.backend() != "tensorflow":
        pytest.skip("Keras' products and activations are in single precision on JAX and torch")
    model = keras.Sequential(
        [
            keras.Input((D,), dtype=dtype),
            layers.Dense(W, "tanh", dtype=dtype, kernel_regularizer=l2 and keras.regularizers.L2(l2), name="hidden"),
            layers.Dense(K, activation, dtype=dtype, name="out"),
        ]
    )
    model.set_weights(split(THETA))
    return model


def loss_of(name, dtype="float32", from_logits=True):
    return _loss_of(name, dtype, from_logits)


@functools.cache
def _loss_of(name, dtype, from_logits):
    if name == "mse":
        return keras.losses.MeanSquaredError(dtype=dtype)
    return keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits, dtype=dtype)


@functools.cache
def operator(kind, loss="cross-entropy", dtype="float32", is_weighted=False, batch_size=256):
    data = (X.astype(dtype), Y if loss == "cross-entropy" else T.astype(dtype))
    data += (SAMPLE_WEIGHT.astype(dtype),) if is_weighted else ()
    cls = {"Hessian": Hessian, "GaussNewton": GaussNewton}.get(kind, Fisher)
    options = {"kind": "empirical"} if kind == "empirical" else {}
    return cls(mlp(dtype), loss_of(loss, dtype), data, batch_size=batch_size, **QUIET, **options)


def matrix_of(operator):
    """Its products with all unit vectors, which is one program where `dense` is one for each variable."""
    return operator @ np.eye(operator.shape[0])


def linear(units=1, size=D, activation=None, **kwargs):
    model = keras.Sequential([keras.Input((size,)), layers.Dense(units, activation, use_bias=False, **kwargs)])
    model.set_weights([np.linspace(-1, 1, size * units, dtype="float32").reshape(size, units)])
    return model


def of_linear(x, curvatures):
    """J' H J / N of z = x W, for the curvatures `(N, K, K)` of the loss by z."""
    n = x.shape[1] * curvatures.shape[1]
    x = x.astype("float64")
    return np.einsum("nd,ne,nkl->dkel", x, x, curvatures).reshape(n, n) / len(x)


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


def test_chunks_change_no_value():
    found = operator("Hessian")
    np.testing.assert_allclose(found.dense(chunk_size=5), found.dense(), rtol=1e-5, atol=1e-7)


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
        assert found.shape == expected.shape
        assert_close(matrix_of(found), expected)
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


# --- the data ---


@pytest.mark.parametrize("kind", ["Hessian", "GaussNewton", "Fisher", "empirical"])
def test_sample_weights_and_a_ragged_batch(kind):
    expected = REFERENCES[kind]("cross-entropy", True)
    assert np.abs(expected - REFERENCES[kind]("cross-entropy")).max() > 0.1 * np.abs(expected).max()
    for batch_size in (10, 256):
        assert_close(matrix_of(operator(kind, is_weighted=True, batch_size=batch_size)), expected)


def test_dense_of_batches():
    assert_close(operator("Hessian", batch_size=30).dense(), hessian_reference("cross-entropy"))


def test_sample_weights_of_zero_leave_examples_out():
    weight = (np.arange(N) < 20).astype("float32")
    found = Hessian(mlp(), loss_of("cross-entropy"), (X, Y, weight), **QUIET) @ V
    fewer = hessian(lambda theta: cross_entropies(forward(theta, X[:20]), Y[:20]).mean(), THETA) @ V
    assert_close(found, fewer * 20 / N)


@pytest.mark.parametrize("cls", [Hessian, GaussNewton, Fisher])
def test_a_loss_that_sums(cls):
    # Each batch has its own sum, times its size.
    x, y = np.ones((6, 1), "float32"), np.zeros((6, 1), "float32")
    loss = keras.losses.MeanSquaredError(reduction="sum")
    found = cls(linear(size=1), loss, (x, y), batch_size=4, **QUIET)
    np.testing.assert_allclose(found @ np.ones(1), [(4 * 8 + 2 * 4) / 6], rtol=1e-6)


class TestWhatLayersAdd:
    C = 0.3

    @pytest.mark.parametrize("cls", [Hessian, GaussNewton, Fisher])
    @pytest.mark.parametrize("batch_size", [10, 256])
    def test_a_regularizer(self, cls, batch_size):
        expected = REFERENCES[cls.__name__]("cross-entropy").copy()
        if cls is not Fisher:
            expected[range(12), range(12)] += 2 * self.C
        found = cls(mlp(l2=self.C), loss_of("cross-entropy"), (X, Y), batch_size=batch_size, **QUIET)
        assert_close(matrix_of(found), expected)

    @pytest.mark.parametrize("cls", [Hessian, GaussNewton])
    def test_a_regularizer_in_dense(self, cls):
        found = cls(mlp(l2=self.C), loss_of("cross-entropy"), (X, Y), mlp(l2=self.C).layers[0], **QUIET)
        expected = REFERENCES[cls.__name__]("cross-entropy")[:16, :16].copy()
        expected[range(12), range(12)] += 2 * self.C
        assert_close(found.dense(), expected)

    def test_a_regularizer_of_other_variables(self):
        found = GaussNewton(mlp(l2=self.C), loss_of("cross-entropy"), (X, Y), mlp(l2=self.C).layers[1], **QUIET)
        assert_close(matrix_of(found), gauss_newton_reference("cross-entropy")[16:, 16:])

    @pytest.mark.parametrize("cls", [Hessian, GaussNewton, Fisher])
    def test_an_added_loss(self, cls):
        x = keras.Input((D,))
        h = layers.Dense(W, "tanh", activity_regularizer=Cubes())(x)
        model = keras.Model(x, layers.Dense(K)(h))
        model.set_weights(split(THETA))

        def total(theta):
            w1, b1, *_ = split(theta)
            return mean_loss("cross-entropy", theta) + (np.tanh(X @ w1 + b1) ** 3).sum() / N

        expected = hessian(total, THETA) if cls is Hessian else gauss_newton_reference("cross-entropy")
        found = cls(model, loss_of("cross-entropy"), (X, Y), batch_size=20, **QUIET)
        assert_close(matrix_of(found), expected)


class Cubes(keras.regularizers.Regularizer):
    def __call__(self, x):
        # Keras divides what regularizes activities by the size of the batch.
        return ops.sum(x**3)


class TestMasks:
    IDS = np.array([[1, 2, 0, 0], [3, 0, 0, 0], [2, 2, 1, 3]])
    CLASSES = RNG.integers(0, K, (3, 4))
    EMBEDDING, KERNEL = RNG.normal(size=(4, 2)).astype("float32"), RNG.normal(size=(2, K)).astype("float32")
    POINT = np.concatenate([EMBEDDING.reshape(-1), KERNEL.reshape(-1)])

    def model(self):
        model = keras.Sequential(
            [keras.Input((4,), dtype="int32"), layers.Embedding(4, 2, mask_zero=True), layers.Dense(K, use_bias=False)]
        )
        model.set_weights([self.EMBEDDING, self.KERNEL])
        return model

    def network(self, theta):
        embedding, kernel = split(theta, [(4, 2), (2, K)])
        return embedding[self.IDS] @ kernel

    @pytest.mark.parametrize("kind", ["Hessian", "GaussNewton", "Fisher", "monte_carlo"])
    def test_padding_has_no_part(self, kind):
        kept = self.IDS > 0

        def loss(theta):
            return cross_entropies(self.network(theta), self.CLASSES)[kept].mean()

        j = jacobian(self.network, self.POINT)[kept]
        expected = np.einsum("nka,nkl,nlb->ab", j, curvature_of_cross_entropies(self.network(self.POINT)[kept]), j)
        expected /= kept.sum()
        if kind == "Hessian":
            expected = hessian(loss, self.POINT)
        cls = {"Hessian": Hessian, "GaussNewton": GaussNewton}.get(kind, Fisher)
        options = {"kind": kind, "samples": 2} if kind == "monte_carlo" else {}
        found = matrix_of(cls(self.model(), loss_of("cross-entropy"), (self.IDS, self.CLASSES), **QUIET, **options))
        if kind == "monte_carlo":
            # Few labels: only where nothing may be is known exactly.
            assert np.abs(found[:2]).max() == np.abs(found[:, :2]).max() == 0 < np.abs(found[2:4, 2:4]).max()
            assert_close(found, found.T)
            return
        assert_close(found, expected)


# --- the Gauss-Newton matrix, and what equals it ---


class TestClosedForms:
    @pytest.mark.parametrize("cls", [Hessian, GaussNewton, Fisher])
    def test_linear_regression(self, cls):
        x = X.astype("float64")
        assert_close(cls(linear(), "mse", (X, T[:, :1]), **QUIET).dense(), 2 * x.T @ x / N)

    @pytest.mark.parametrize("cls", [Hessian, GaussNewton, Fisher])
    def test_softmax_regression(self, cls):
        model = linear(K)
        expected = of_linear(X, curvature_of_cross_entropies(X @ model.get_weights()[0].astype("float64")))
        assert_close(cls(model, loss_of("cross-entropy"), (X, Y), **QUIET).dense(), expected)

    @pytest.mark.parametrize("cls", [Hessian, GaussNewton, Fisher])
    @pytest.mark.parametrize("activation", [None, "sigmoid"])
    def test_logistic_regression(self, cls, activation):
        model = linear(K, activation=activation)
        p = 1 / (1 + np.exp(-X @ model.get_weights()[0].astype("float64")))
        expected = of_linear(X, (p * (1 - p))[:, :, None] * np.eye(K) / K)
        loss = keras.losses.BinaryCrossentropy(from_logits=activation is None)
        found = matrix_of(cls(model, loss, (X, B), **QUIET))
        assert_close(found, expected, 1e-5 if activation is None else 1e-4)


def one_hot(y):
    return np.eye(K, dtype="float32")[y]


@pytest.mark.parametrize("cls", [GaussNewton, Fisher])
@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        ("sparse_categorical_crossentropy", Y),
        ("categorical_crossentropy", one_hot(Y)),
        (keras.losses.SparseCategoricalCrossentropy, Y),
        (keras.losses.sparse_categorical_crossentropy, Y),
        (keras.losses.CategoricalCrossentropy(), one_hot(Y)),
        (["categorical_crossentropy"], one_hot(Y)),
    ],
    ids=["name", "name of one-hot", "class", "function", "object", "list"],
)
def test_probabilities_equal_logits(cls, loss, labels):
    found = cls(mlp(activation="softmax"), loss, (X, labels), **QUIET) @ V
    assert_close(found, gauss_newton_reference("cross-entropy") @ V, 2e-5)


@pytest.mark.float64
@pytest.mark.parametrize("cls", [GaussNewton, Fisher])
def test_probabilities_in_double_precision(cls):
    loss = loss_of("cross-entropy", "float64", from_logits=False)
    found = cls(mlp("float64", "softmax"), loss, (X.astype("float64"), Y), **QUIET) @ V.astype("float64")
    assert_close(found, gauss_newton_reference("cross-entropy") @ V, 1e-9)


@pytest.mark.parametrize("cls", [Hessian, GaussNewton, Fisher])
@pytest.mark.parametrize("activation", [None, "softmax"])
def test_a_weight_of_the_compiled_loss(cls, activation):
    model = linear(K, activation=activation)
    model.compile(loss=loss_of("cross-entropy", from_logits=activation is None), loss_weights=[3.0])
    expected = 3 * of_linear(X, curvature_of_cross_entropies(X @ model.get_weights()[0].astype("float64")))
    assert_close(matrix_of(cls(model, None, (X, Y), **QUIET)), expected, 2e-5)


@pytest.mark.parametrize("activation", [None, "softmax"])
def test_classes_on_another_axis(activation):
    # z of shape (batch, K, 2), classes on axis 1: there is a likelihood of these, but not one that is known here.
    model = keras.Sequential([keras.Input((D,)), layers.Dense(K * 2, use_bias=False), layers.Reshape((K, 2))])
    if activation:
        model.add(layers.Softmax(axis=1))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=activation is None, axis=1)
    data = (X, np.stack([Y, Y[::-1]], axis=1))
    with pytest.raises(ValueError, match="Fisher knows the distributions of"):
        Fisher(model, loss, data, **QUIET)
    if keras.config.backend() != "torch":
        pytest.skip("Keras' sparse cross-entropy on TensorFlow and JAX knows no other axis than the last")
    p = softmax(np.swapaxes((X @ model.get_weights()[0].astype("float64")).reshape(N, K, 2), 1, 2))
    if activation:
        # Of the probabilities q themselves: J' diag(1/q) J for the labels of the data.
        labels = one_hot(data[1])
        slope = p[..., None] * np.eye(K) - p[..., :, None] * p[..., None, :]
        curvature = np.einsum("ntak,ntk,ntkb->ntab", slope, labels / p**2, slope)
    else:
        curvature = p[..., None] * np.eye(K) - p[..., :, None] * p[..., None, :]
    both = np.einsum("ntab,ts->natbs", curvature, np.eye(2)).reshape(N, 2 * K, 2 * K) / 2
    assert_close(matrix_of(GaussNewton(model, loss, data, **QUIET)), of_linear(X, both), 1e-4)


# --- the Fisher matrix by draws ---


@functools.cache
def linear_of_two(units, activation=None):
    return linear(units, 2, activation)


class TestMonteCarlo:
    # Three inputs, each of them many times: a label is drawn for each.
    FEW = np.array([[1.0, -0.5], [0.3, 2.0], [-1.5, 0.7]], "float32")
    REPEATED = np.repeat(FEW, 700, axis=0)
    CASES = {
        "sparse": (K, "softmax", "sparse_categorical_crossentropy", np.zeros(2100, "int32")),
        "sparse logits": (K, None, loss_of("cross-entropy"), np.zeros(2100, "int32")),
        "one-hot": (K, "softmax", "categorical_crossentropy", np.zeros((2100, K), "float32")),
        "binary": (2, "sigmoid", "binary_crossentropy", np.zeros((2100, 2), "float32")),
        "mse": (2, None, "mse", np.zeros((2100, 2), "float32")),
    }

    @staticmethod
    def fisher(case="sparse", count=2100, **options):
        units, activation, loss, y = TestMonteCarlo.CASES[case]
        model = linear_of_two(units, activation)
        data = (TestMonteCarlo.REPEATED[:count], y[:count])
        return Fisher(model, loss, data, kind="monte_carlo", **{"batch_size": 2100, **QUIET, **options})

    def exact(self, case):
        units = self.CASES[case][0]
        z = self.FEW @ linear_of_two(units).get_weights()[0].astype("float64")
        if case == "mse":
            curvature = np.broadcast_to(np.eye(2), (3, 2, 2))
        elif case == "binary":
            p = 1 / (1 + np.exp(-z))
            curvature = (p * (1 - p))[:, :, None] * np.eye(2) / 2
        else:
            curvature = curvature_of_cross_entropies(z)
        return of_linear(self.FEW, curvature)

    @pytest.mark.parametrize(
        "case",
        ["sparse", "mse", *[pytest.param(c, marks=pytest.mark.slow) for c in ("sparse logits", "one-hot", "binary")]],
    )
    def test_converges_to_the_exact_one(self, case):
        # 16800 draws: an error of sqrt(2 / 16800) = 1% is to be expected of a single element.
        found, exact = matrix_of(self.fisher(case, samples=8)), self.exact(case)
        assert 1e-5 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.04

    def test_sample_weights(self):
        weight = np.repeat([0.0, 3.0, 1.0], 700).astype("float32")
        units, activation, loss, y = self.CASES["sparse"]
        data = (self.REPEATED, y, weight)
        found = Fisher(
            linear_of_two(units, activation), loss, data, kind="monte_carlo", samples=8, batch_size=2100, **QUIET
        )
        z = self.FEW @ linear_of_two(units).get_weights()[0].astype("float64")
        exact = of_linear(self.FEW, np.array([0.0, 3.0, 1.0])[:, None, None] * curvature_of_cross_entropies(z))
        assert np.linalg.norm(matrix_of(found) - exact) / np.linalg.norm(exact) < 0.04

    def test_the_seed_repeats(self):
        few = {"count": 30, "batch_size": 20, "samples": 3}
        one = self.fisher(seed=5, **few)
        first = matrix_of(one)
        assert np.array_equal(matrix_of(one), first)
        assert np.array_equal(matrix_of(self.fisher(seed=5, **few)), first)
        keras.utils.set_random_seed(99)
        assert np.array_equal(matrix_of(self.fisher(seed=5, **few)), first)
        assert np.abs(matrix_of(self.fisher(seed=6, **few)) - first).max() > 1e-2 * np.abs(first).max()

    def test_products_and_dense_have_the_same_labels(self):
        found = self.fisher(count=30, batch_size=20, samples=3)
        assert_close(found.dense(), matrix_of(found))

    def test_batches_and_samples_draw_anew(self):
        # The same three inputs in each batch: were the labels the same as well, so would be the matrices.
        def of(count, **options):
            x, y = np.tile(self.FEW, (count, 1)), np.zeros(3 * count, "int32")
            found = Fisher(
                linear_of_two(K), loss_of("cross-entropy"), (x, y), kind="monte_carlo", batch_size=3, **options
            )
            return matrix_of(found)

        one = of(1, verbose=0)
        assert np.abs(of(4, verbose=0) - one).max() > 1e-2 * np.abs(one).max()
        assert np.abs(of(1, samples=4, verbose=0) - one).max() > 1e-2 * np.abs(one).max()

    @pytest.mark.parametrize(
        ("loss", "units", "activation"),
        [
            (keras.losses.CategoricalCrossentropy(label_smoothing=0.5), K, "softmax"),
            (keras.losses.BinaryCrossentropy(label_smoothing=0.5), 2, "sigmoid"),
        ],
        ids=["categorical", "binary"],
    )
    def test_smoothed_labels(self, loss, units, activation):
        # The loss of a smoothed label is that of the label with another gradient, but the same curvature.
        data = (self.REPEATED, np.eye(units, dtype="float32")[np.zeros(2100, "int32")])
        found, exact = (
            matrix_of(
                Fisher(linear_of_two(units, activation), loss, data, kind=kind, samples=8, batch_size=2100, **QUIET)
            )
            for kind in ("monte_carlo", "exact")
        )
        assert_close(exact, self.exact("sparse" if units == K else "binary"), 1e-4)
        assert np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.04


class TestEmpirical:
    def test_equals_the_gradients_of_each_example(self):
        model = mlp()

        def loss(weights, x, y):
            z, _ = model.stateless_call(weights, [], x)
            return loss_of("cross-entropy")(y, z)

        weights = [ops.convert_to_tensor(w) for w in model.get_weights()]
        gradients = kg.per_example_grad(loss)(weights, ops.convert_to_tensor(X), ops.convert_to_tensor(Y))
        g = np.concatenate([ops.convert_to_numpy(p).reshape(N, -1) for p in gradients], axis=1).astype("float64")
        assert_close(matrix_of(operator("empirical")), g.T @ g / N)

    def test_any_loss(self):
        def cubes(y_true, y_pred):
            return ops.sum(ops.abs(y_true - y_pred) ** 3, axis=-1)

        model = linear(1)
        found = matrix_of(Fisher(model, cubes, (X, T[:, :1]), kind="empirical", **QUIET))
        error = X @ model.get_weights()[0].astype("float64") - T[:, :1]
        g = 3 * error * np.abs(error) * X
        assert_close(found, g.T @ g / N)

    def test_weights_in_a_column(self):
        data = (X, Y, SAMPLE_WEIGHT[:, None])
        found = Fisher(mlp(), loss_of("cross-entropy"), data, kind="empirical", **QUIET)
        assert_close(found @ V, empirical_reference("cross-entropy", True) @ V)


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
        assert_close(matrix_of(found), expected)


def test_weights_after_training_are_seen():
    model = linear(K)
    model.compile("sgd", loss_of("cross-entropy"))
    found = Hessian(model, None, (X, Y), **QUIET)
    before = matrix_of(found)
    model.fit(X, Y, epochs=3, verbose=0)
    expected = of_linear(X, curvature_of_cross_entropies(X @ model.get_weights()[0].astype("float64")))
    assert np.abs(expected - before).max() > 1e-3
    assert_close(matrix_of(found), expected)


def test_a_layer_is_a_model():
    layer = layers.Dense(K, use_bias=False)
    layer.build((None, D))
    expected = of_linear(X, curvature_of_cross_entropies(X @ ops.convert_to_numpy(layer.kernel).astype("float64")))
    assert_close(matrix_of(Hessian(layer, loss_of("cross-entropy"), (X, Y), **QUIET)), expected)


class TestTraining:
    def test_dropout_is_replayed(self):
        # A copy of the layer, with a seed of the same state, drops the same elements.
        dropped = ops.convert_to_numpy(layers.Dropout(0.5, seed=7)(X, training=True)).astype("float64")
        assert 0.2 < (dropped == 0).mean() < 0.8
        model = keras.Sequential([keras.Input((D,)), layers.Dropout(0.5, seed=7), layers.Dense(1, use_bias=False)])
        for cls in (Hessian, GaussNewton, Fisher):
            found = cls(model, "mse", (X, T[:, :1]), training=True, **QUIET)
            assert_close(matrix_of(found), 2 * dropped.T @ dropped / N)
            assert np.array_equal(found @ np.ones(D), found @ np.ones(D))
            still = cls(model, "mse", (X, T[:, :1]), **QUIET)
            assert_close(still @ np.ones(D), 2 * X.T.astype("float64") @ X @ np.ones(D) / N)

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
        assert_close(matrix_of(found), expected, 2e-5)


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
    use(cls(model, loss_of("cross-entropy"), (X, Y), training=True, batch_size=20, **QUIET, **options))
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
def test_nothing_is_traced_again(cls, backend):
    if backend == "torch":
        pytest.skip("torch runs eagerly, so that the loss is called for each batch")
    calls = []

    def counted(y_true, y_pred):
        calls.append(None)
        return ops.mean((y_true - y_pred) ** 2, axis=-1)

    model = linear(K)
    found = cls(model, counted, (X, T), batch_size=10, **QUIET)
    expected = found @ np.ones(D * K)
    traced = len(calls)
    assert traced > 0
    for _ in range(3):
        np.testing.assert_array_equal(found @ np.ones(D * K), expected)
    found @ ops.ones(D * K)
    model.set_weights([2 * w for w in model.get_weights()])
    found @ np.arange(D * K)
    assert len(calls) == traced
    # One more for a stack of columns, the next of them none.
    found @ np.eye(D * K)
    traced = len(calls)
    found @ np.eye(D * K)
    assert len(calls) == traced
    assert_close(found @ np.eye(D * K), of_linear(X, curvature_of_squares(X)))


# --- SciPy ---


class TestSciPy:
    linalg = property(lambda self: pytest.importorskip("scipy.sparse.linalg"))

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
