"""kernel_hessian: equal to the Hessian that `hessian` gives, in models of all kinds; and when it refuses."""

import threading
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from tests.cases import close, tensor
from tests.compilers import COMPILERS, compiled_by

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype("float32")


def loss(labels, logits):
    return ops.mean(keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True))


def by_hessian(fun, layer, *args):
    """The same by `hessian`, of the model as a function of that kernel alone."""
    others = [v for v in layer.trainable_variables if v is not layer.kernel]
    assert len(others) <= 1
    model, x, y = args
    fun, weights = kg.functionalize(model)
    (place,) = [i for i, v in enumerate(model.trainable_variables) if v is layer.kernel]

    def of_kernel(kernel):
        return loss(y, fun([*weights[:place], kernel, *weights[place + 1 :]], x))

    return ops.convert_to_numpy(kg.hessian(of_kernel)(weights[place]))


def shared():
    layer = layers.Dense(3, activation="tanh")
    x = keras.Input((3,))
    return keras.Model(x, layers.Dense(2)(layer(x) * layer(ops.sin(x)))), layer


def in_time(recurrent=layers.SimpleRNN):
    layer = layers.Dense(2, activation="tanh")
    x = keras.Input((4, 3))
    return keras.Model(x, layers.Dense(2)(recurrent(3)(layer(x)))), layer


def before_lstm():
    return in_time(layers.LSTM)


def nested():
    layer = layers.Dense(3, activation="gelu")
    inner = keras.Sequential([layers.Input((3,)), layers.BatchNormalization(), layer, layers.LayerNormalization()])
    return keras.Sequential([layers.Input((3,)), inner, layers.Dense(2)]), layer


def last():
    layer = layers.Dense(2)
    return keras.Sequential([layers.Input((3,)), layers.Dense(4, activation="relu"), layer]), layer


def first():
    layer = layers.Dense(4, activation="tanh", use_bias=False)
    return keras.Sequential([layers.Input((3,)), layer, layers.Dense(4, activation="tanh"), layers.Dense(2)]), layer


@pytest.mark.parametrize(
    "make",
    [
        *[first, last, shared],
        *[pytest.param(make, marks=pytest.mark.fast_on("torch")) for make in (nested, in_time)],
        pytest.param(before_lstm, marks=pytest.mark.slow),
    ],
)
def test_equals_the_hessian(make):
    model, layer = make()
    x, y = tensor(normal(5, *model.input_shape[1:])), ops.convert_to_tensor(np.array([0, 1, 1, 0, 1]))
    call, activation, before = layer.call, layer.activation, model.get_weights()
    expected = by_hessian(None, layer, model, x, y)
    for _ in range(2):
        found = kg.kernel_hessian(lambda x, y: loss(y, model(x)), layer)(x, y)
        close(found, expected, rtol=0, atol=1e-6 + 2e-6 * np.abs(expected).max())
    assert layer.call == call and layer.activation is activation
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_closed_form():
    """f = sum_b (w' a_b)^3 / 6 has the Hessian sum_b (w' a_b) a_b a_b'."""
    layer = layers.Dense(1, use_bias=False)
    model = keras.Sequential([layers.Input((3,)), layer])
    a, w = normal(200, 3), normal(3, 1)
    layer.set_weights([w])
    found = kg.kernel_hessian(lambda x: ops.sum(model(x) ** 3) / 6, layer)(a)
    close(found, np.einsum("b,bi,bj->ij", (a @ w)[:, 0], a, a)[:, None, :, None], rtol=1e-4, atol=1e-4)


def test_new_weights_are_seen():
    model, layer = first()
    hessian = kg.kernel_hessian(lambda x, y: loss(y, model(x)), layer)
    x, y = tensor(normal(5, 3)), ops.convert_to_tensor(np.array([0, 1, 1, 0, 1]))
    hessian(x, y)
    model.set_weights([2 * w for w in model.get_weights()])
    expected = by_hessian(None, layer, model, x, y)
    close(hessian(x, y), expected, rtol=0, atol=2e-6 * np.abs(expected).max() + 1e-6)


# XLA compiles what `tf.function` has traced.
with_every_compiler = pytest.mark.parametrize(
    "compiler", [c for c in COMPILERS if c.name != "tf.function"], ids=lambda c: c.name
)


@with_every_compiler
def test_compiled_by_others(compiler):
    model, layer = first()
    x, y = tensor(normal(5, 3)), ops.convert_to_tensor(np.array([0, 1, 1, 0, 1]))
    compiled = compiler.compile(kg.kernel_hessian(lambda x, y: loss(y, model(x)), layer))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*eagerly")
        found = compiled_by(lambda: compiled(x, y))
    expected = by_hessian(None, layer, model, x, y)
    close(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max() + 1e-6)


@with_every_compiler
def test_wherever_the_sum_does_not_hold_it_says_so(compiler):
    layer = layers.Dense(3)
    model = keras.Sequential([layers.Input((3,)), layer, layers.BatchNormalization(), layers.Dense(2)])
    x, y = tensor(normal(5, 3)), ops.convert_to_tensor(np.array([0, 1, 1, 0, 1]))
    mixing = compiler.compile(kg.kernel_hessian(lambda x, y: loss(y, model(x, training=True)), layer))
    penalized = kg.kernel_hessian(lambda x, y: loss(y, model(x)) + ops.sum(layer.kernel**2), layer)
    penalized = compiler.compile(penalized)
    if compiler.name == "eager":
        with pytest.raises(ValueError, match="takes a function of independent examples"):
            mixing(x, y)
        with pytest.raises(ValueError, match="through the layer's calls alone"):
            penalized(x, y)
    else:
        assert np.isnan(ops.convert_to_numpy(mixing(x, y))).all()
        assert np.isnan(ops.convert_to_numpy(penalized(x, y))).all()


def test_one_call_of_the_layer_must_not_feed_another():
    layer = layers.Dense(3, activation="tanh")
    model = keras.Sequential([layers.Input((3,)), layer, layer])
    with pytest.raises(ValueError, match="where the output of one call is the input of another"):
        kg.kernel_hessian(lambda x: ops.sum(model(x) ** 2), layer)(normal(2, 3))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: kg.kernel_hessian(3, first()[1]), "kernel_hessian takes a function"),
        (lambda: kg.kernel_hessian(ops.sum, layers.Flatten()), "takes a keras.layers.Dense.*Flatten"),
        (lambda: kg.kernel_hessian(ops.sum, layers.Dense(1)), "takes a built layer"),
        (lambda: kg.kernel_hessian(lambda x: ops.sum(x), first()[1])(normal(2, 3)), "which it does not call"),
        (lambda: (lambda m, d: kg.kernel_hessian(m, d)(normal(2, 3)))(*first()), "must return one scalar"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()


ROWS = np.array([[1.0, 2.0], [3.0, 5.0]], "float32")


class TestKernelHessian:
    def test_a_regularizer_whose_gradient_vanishes(self):
        layer = layers.Dense(1, kernel_initializer="zeros")
        model = keras.Sequential([layers.Input((2,)), layer])
        with pytest.raises(ValueError, match="through the layer's calls alone"):
            kg.kernel_hessian(lambda x: ops.sum(model(x) ** 2) + 10 * ops.sum(layer.kernel**2), layer)(ROWS)

    def test_no_examples(self):
        layer = layers.Dense(3)
        model = keras.Sequential([layers.Input((2,)), layer])
        found = kg.kernel_hessian(lambda x: ops.sum(model(x) ** 2), layer)(ROWS[:0])
        close(found, np.zeros((2, 3, 2, 3)))

    def test_two_threads(self):
        layer = layers.Dense(1, use_bias=False)
        model = keras.Sequential([layers.Input((2,)), layer])
        call, found = layer.call, []

        def run():
            found.append(ops.convert_to_numpy(kg.kernel_hessian(lambda x: ops.sum(model(x) ** 2), layer)(ROWS)))

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for hessian in found:
            close(hessian[:, 0, :, 0], 2 * ROWS.T @ ROWS, rtol=1e-4)
        assert len(found) == 4 and layer.call == call
