"""per_example_grad: closed forms, and the gradient of each example alone."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from tests.cases import close, tensor
from tests.compilers import with_every_compiler

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype("float32")


def squares(w, x, y):
    return ops.mean((ops.matmul(x, w["w"]) + w["b"] - y) ** 2)


W, X, Y = {"w": normal(3), "b": np.float32(0.5)}, normal(5, 3), normal(5)
RESIDUAL = 2 * (X @ W["w"] + W["b"] - Y)


@with_every_compiler
def test_linear_least_squares(compiler):
    found = compiler.compile(kg.per_example_grad(squares))(keras.tree.map_structure(tensor, W), tensor(X), tensor(Y))
    close(found, {"w": RESIDUAL[:, None] * X, "b": RESIDUAL}, rtol=1e-4, atol=1e-5)


def test_their_mean_is_the_gradient():
    found = kg.per_example_grad(squares)(W, X, Y)
    close(
        keras.tree.map_structure(lambda g: ops.mean(g, axis=0), found),
        _numpy(kg.grad(squares)(W, tensor(X), tensor(Y))),
        atol=1e-5,
    )


def _numpy(structure):
    return keras.tree.map_structure(ops.convert_to_numpy, structure)


def test_another_place_for_the_weights():
    found = kg.per_example_grad(lambda x, y, w: squares(w, x, y), argnums=2)(X, Y, W)
    close(found["w"], RESIDUAL[:, None] * X, rtol=1e-4, atol=1e-5)


def _convolutions():
    return [layers.Input((8, 8, 3)), layers.Conv2D(16, 3, activation="tanh"), layers.MaxPooling2D(), layers.Flatten()]


MODELS = {
    "dense": lambda: [layers.Input((3,)), layers.Dense(4, activation="tanh")],
    "convolution": _convolutions,
    "recurrent": lambda: [layers.Input((4, 2)), layers.SimpleRNN(3)],
    "normalization": lambda: [layers.Input((3,)), layers.BatchNormalization(), layers.LayerNormalization()],
    "dropout": lambda: [layers.Input((3,)), layers.Dense(8), layers.Dropout(0.5, seed=0)],
}


LIKE_OTHERS = ("dense", "normalization")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.fast_on("torch") if name in LIKE_OTHERS else ()) for name in MODELS]
)
def test_models_as_one_example_after_the_other(name):
    model = keras.Sequential([*MODELS[name](), layers.Dense(2)])
    fun, weights = kg.functionalize(model)
    x, y = tensor(normal(4, *model.input_shape[1:])), ops.convert_to_tensor(np.array([0, 1, 1, 0]))
    before = _numpy([v.value for v in model.variables])

    def loss(w, x, y):
        logits = fun(w, x, training=name == "dropout")
        return ops.mean(keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(TensorFlow|torch) cannot vectorize")
        found = kg.per_example_grad(loss)(weights, x, y)
    for i in range(4):
        alone = kg.grad(loss)(weights, x[i : i + 1], y[i : i + 1])
        close([g[i] for g in found], _numpy(alone), rtol=1e-3, atol=1e-5)
    close(_numpy([v.value for v in model.variables]), before, rtol=0, atol=0)


def test_can_be_differentiated():
    """The gradient of the sum of squared norms."""

    def total(w):
        return ops.sum(kg.per_example_grad(lambda w, x: ops.sum(w**3) * ops.sum(x))(w, tensor(X)) ** 2)

    w = normal(2)
    expected = np.sum(X.sum(axis=1) ** 2) * 36 * w**3
    close(kg.grad(total)(tensor(w)), expected, rtol=1e-4, atol=1e-4)
    w = tensor(w)
    with kg.GradientTape() as tape:
        tape.watch(w)
        y = total(w)
    close(tape.gradient(y, w), expected, rtol=1e-4, atol=1e-4)


def test_unconnected_is_zero():
    used, unused = kg.per_example_grad(lambda w, x: ops.sum(w[0] * x))([tensor(2.0), tensor([1.0, 1.0])], X)
    close([used, unused], [X.sum(axis=1), np.zeros((5, 2))], rtol=1e-5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: kg.per_example_grad(3), "per_example_grad takes a function"),
        (lambda: kg.per_example_grad(squares, argnums=(0, 1)), "expects one position as `argnums`.*\\(0, 1\\)"),
        (lambda: kg.per_example_grad(squares, argnums=3)(W, X, Y), "argnums=3"),
        (lambda: kg.per_example_grad(squares)(W, X, Y[:2]), "one batch size.*\\(5, 3\\), \\(2,\\)"),
        (lambda: kg.per_example_grad(lambda w, x: w)(2.0, 3.0), "tensors of shape \\(batch"),
        (lambda: kg.per_example_grad(lambda w: w)(2.0), "tensors of shape \\(batch"),
        (lambda: kg.per_example_grad(lambda w, x: w * x)(2.0, X), "must return one scalar"),
        (lambda: kg.per_example_grad(squares)(1, X, Y), "Argument 0 under `per_example_grad` must be real and float"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()


class TestPerExample:
    def test_a_variable_under_a_tape(self):
        v = keras.Variable(3.0)
        with kg.GradientTape() as tape:
            y = ops.sum(kg.per_example_grad(lambda w, x: ops.sum(w * w * v * x))(2.0, tensor([1.0, 2.0])))
        close(tape.gradient(y, v), 12.0)

    def test_a_gradient_inside(self):
        found = kg.per_example_grad(lambda w, x: ops.sum(kg.grad(lambda x: ops.sum(w * x**3))(x) ** 2))(
            tensor(2.0), tensor([1.0, 2.0])
        )
        close(found, [36.0, 576.0], rtol=1e-5)

    def test_a_reversed_gradient(self):
        found = kg.per_example_grad(lambda w, x: ops.sum(kg.reverse_gradient(w) * x))(2.0, tensor([1.0, 2.0]))
        close(found, [-1.0, -2.0])

    def test_no_examples(self):
        found = kg.per_example_grad(lambda w, x: ops.sum(w * x))(tensor([2.0]), np.zeros((0, 1), "float32"))
        assert tuple(found.shape) == (0, 1)
