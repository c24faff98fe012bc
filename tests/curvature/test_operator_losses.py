"""The curvature of losses: weights of examples, regularizers, masks, probabilities and logits, drawn labels."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.curvature import Fisher, GaussNewton, Hessian
from tests.curvature.reference import (
    QUIET,
    REFERENCES,
    RNG,
    SAMPLE_WEIGHT,
    THETA,
    B,
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
    empirical_reference,
    forward,
    gauss_newton_reference,
    hessian,
    hessian_reference,
    jacobian,
    linear,
    loss_of,
    matrix_of,
    mean_loss,
    mlp,
    of_linear,
    operator,
    softmax,
    split,
)

# --- the data ---


@pytest.mark.parametrize("kind", ["Hessian", "GaussNewton", "Fisher", "empirical"])
def test_sample_weights_and_a_ragged_batch(kind):
    expected = REFERENCES[kind]("cross-entropy", True)
    assert np.abs(expected - REFERENCES[kind]("cross-entropy")).max() > 0.1 * np.abs(expected).max()
    assert_is(operator(kind, is_weighted=True, batch_size=10), expected)


def test_dense_of_batches_in_chunks():
    assert_close(operator("Hessian", batch_size=30).dense(chunk_size=5), hessian_reference("cross-entropy"))


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
    def test_a_regularizer(self, cls):
        expected = REFERENCES[cls.__name__]("cross-entropy").copy()
        if cls is not Fisher:
            expected[range(12), range(12)] += 2 * self.C
        # Once, however many batches there are.
        assert_is(cls(mlp(l2=self.C), loss_of("cross-entropy"), (X, Y), batch_size=10, **QUIET), expected)

    @pytest.mark.parametrize("cls", [Hessian, GaussNewton])
    def test_a_regularizer_in_dense(self, cls):
        found = cls(mlp(l2=self.C), loss_of("cross-entropy"), (X, Y), mlp(l2=self.C).layers[0], **QUIET)
        expected = REFERENCES[cls.__name__]("cross-entropy")[:16, :16].copy()
        expected[range(12), range(12)] += 2 * self.C
        assert_close(found.dense(), expected)

    def test_a_regularizer_of_other_variables(self):
        found = GaussNewton(mlp(l2=self.C), loss_of("cross-entropy"), (X, Y), mlp(l2=self.C).layers[1], **QUIET)
        assert_is(found, gauss_newton_reference("cross-entropy")[16:, 16:])

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
        assert_is(cls(model, loss_of("cross-entropy"), (X, Y), batch_size=20, **QUIET), expected)


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
        found = cls(self.model(), loss_of("cross-entropy"), (self.IDS, self.CLASSES), **QUIET, **options)
        if kind == "monte_carlo":
            found = matrix_of(found)
            # Few labels: only where nothing may be is known exactly.
            assert np.abs(found[:2]).max() == np.abs(found[:, :2]).max() == 0 < np.abs(found[2:4, 2:4]).max()
            assert_close(found, found.T)
            return
        assert_is(found, expected)


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
        assert_is(cls(model, loss, (X, B), **QUIET), expected, 1e-5 if activation is None else 1e-4)


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
    assert_is(cls(model, None, (X, Y), **QUIET), expected, 2e-5)


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
    assert_is(GaussNewton(model, loss, data, **QUIET), of_linear(X, both), 1e-4)


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
        [
            "sparse",
            pytest.param("mse", marks=pytest.mark.fast_on("torch")),
            *[pytest.param(c, marks=pytest.mark.slow) for c in ("sparse logits", "one-hot", "binary")],
        ],
    )
    def test_converges_to_the_exact_one(self, case):
        # 16800 draws: an error of sqrt(2 / 16800) = 1% is to be expected of a single element.
        found, exact = matrix_of(self.fisher(case, samples=8)), self.exact(case)
        assert 1e-5 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.04

    @pytest.mark.fast_on("torch")
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

    @pytest.mark.fast_on("torch")
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
            pytest.param(
                *(keras.losses.BinaryCrossentropy(label_smoothing=0.5), 2, "sigmoid"),
                marks=pytest.mark.fast_on("torch"),
            ),
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
        assert_is(operator("empirical"), g.T @ g / N)

    def test_any_loss(self):
        def cubes(y_true, y_pred):
            return ops.sum(ops.abs(y_true - y_pred) ** 3, axis=-1)

        model = linear(1)
        found = Fisher(model, cubes, (X, T[:, :1]), kind="empirical", **QUIET)
        error = X @ model.get_weights()[0].astype("float64") - T[:, :1]
        g = 3 * error * np.abs(error) * X
        assert_is(found, g.T @ g / N)

    def test_weights_in_a_column(self):
        data = (X, Y, SAMPLE_WEIGHT[:, None])
        found = Fisher(mlp(), loss_of("cross-entropy"), data, kind="empirical", **QUIET)
        assert_close(found @ V, empirical_reference("cross-entropy", True) @ V)
