"""What only TensorFlow can get wrong: stale flags, lost watches, normalization, and what cannot be vectorized."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from tests.cases import close, tensor

if keras.config.backend() != "tensorflow":
    pytest.skip("the traps of TensorFlow", allow_module_level=True)

import tensorflow as tf

from keras_gradtools.backend.tensorflow import vectorize


def variance_hessian(n):
    """The Hessian of the variance of n numbers: (2/n) (I - 1 1' / n)."""
    return 2 / n * (np.eye(n) - np.ones((n, n)) / n)


@pytest.mark.parametrize("compiler", [lambda f: f, tf.function, lambda f: tf.function(f, jit_compile=True)])
def test_moments_have_a_second_derivative(compiler):
    """`tf.nn.moments` takes the mean inside the variance for a constant, which gives diag(2/n)."""

    def hessian(x):
        with kg.GradientTape() as outer:
            outer.watch(x)
            with kg.GradientTape() as inner:
                inner.watch(x)
                variance = ops.moments(x, [0])[1]
            gradient = inner.gradient(variance, x)
        return outer.jacobian(gradient, x)

    close(compiler(hessian)(tensor([1.0, 2.0, 4.0])), variance_hessian(3))


@pytest.mark.parametrize("keepdims", [False, True])
def test_moments_have_the_values_of_the_original(keepdims):
    x = tensor(np.random.default_rng(0).normal(size=(4, 3, 2)))
    expected = ops.moments(x, [0, 1], keepdims=keepdims)
    with kg.GradientTape():
        actual = ops.moments(x, [0, 1], keepdims=keepdims)
    close(list(actual), [np.asarray(e) for e in expected])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos3"])
def test_resizing_has_a_second_derivative(interpolation, compiled):
    """TensorFlow alone raises `LookupError`, and for bilinear resizing gives no derivative at all."""
    resize = keras.layers.Resizing(3, 5, interpolation=interpolation)

    def derivatives(x):
        with kg.GradientTape(persistent=True) as outer:
            outer.watch(x)
            with kg.GradientTape() as inner:
                inner.watch(x)
                resized = resize(x)
                y = ops.sum(ops.square(resized))
            gradient = inner.gradient(y, x)
        return outer.jacobian(resized, x), outer.jacobian(gradient, x)

    x = tensor(np.random.default_rng(0).normal(size=(1, 2, 3, 1)))
    linear, hessian = (tf.function(derivatives) if compiled else derivatives)(x)
    linear = np.asarray(linear).reshape(15, 6)
    assert np.abs(linear).max() > 0.5
    close(ops.reshape(hessian, (6, 6)), 2 * linear.T @ linear, 1e-5)


def test_a_variable_that_tensorflow_takes_for_frozen():
    layer = keras.layers.Dense(1, use_bias=False)
    layer.trainable = False
    layer.build((None, 2))
    layer.trainable = True
    x = tensor([[1.0, 2.0]])
    with kg.GradientTape() as tape:
        y = layer(x)
    close(tape.gradient(y, layer.kernel), [[1.0], [2.0]])


def test_a_function_traced_before_the_tape():
    v = keras.Variable(3.0)
    square = tf.function(lambda: v * v)
    square()
    with kg.GradientTape() as tape:
        y = square()
    close(tape.gradient(y, v), 6)


def test_what_cannot_be_vectorized_is_computed_row_by_row():
    """A Python function in the backward pass has no vectorized form."""

    @kg.custom_gradient
    def square(x):
        return x * x, lambda u: tf.ensure_shape(tf.py_function(lambda u, x: 2 * x * u, [u, x], tf.float32), x.shape)

    vectorize.warn_unvectorized.cache_clear()
    x = np.arange(vectorize._MOST_EAGER_ROWS + 1.0)
    with kg.GradientTape() as tape:
        argument = tensor(x)
        tape.watch(argument)
        y = square(argument)
    close(tape.jacobian(y, argument), np.diag(2 * x))


def test_jacobians_do_not_warn_of_retracing(caplog):
    x = np.arange(vectorize._MOST_EAGER_ROWS + 1.0)
    for _ in range(8):
        with kg.GradientTape() as tape:
            argument = tensor(x)
            tape.watch(argument)
            y = argument * argument
        close(tape.jacobian(y, argument), np.diag(2 * x))
    assert "retracing" not in caplog.text


@pytest.mark.parametrize("recurrent", [keras.layers.LSTM, keras.layers.GRU])
def test_examples_of_a_recurrent_model_of_tokens_one_by_one(recurrent):
    """The vectorizer has a `TypeError` for the loop of a recurrent layer."""
    model = keras.Sequential([keras.Input((4,), dtype="int32"), keras.layers.Embedding(5, 3), recurrent(2)])
    fun, weights = kg.functionalize(model)

    def loss(weights, x):
        return ops.sum(ops.square(fun(weights, x)))

    x = np.array([[0, 1, 2, 1], [4, 4, 3, 0]], "int32")
    vectorize.warn_unvectorized.cache_clear()
    with pytest.warns(UserWarning, match="one example at a time"):
        found = kg.per_example_grad(loss)(weights, x)
    for i in range(2):
        alone = kg.grad(loss)(weights, ops.convert_to_tensor(x[i : i + 1]))
        close([g[i] for g in found], [ops.convert_to_numpy(g) for g in alone])


@pytest.mark.parametrize("error", [TypeError("dtype"), KeyError("variant"), AssertionError(), RuntimeError("no loop")])
def test_whatever_the_vectorizer_raises_leads_to_the_loop(monkeypatch, error):
    def vectorized_map(*args, **kwargs):
        raise error

    monkeypatch.setattr(tf, "vectorized_map", vectorized_map)
    vectorize.warn_unvectorized.cache_clear()
    with pytest.warns(UserWarning, match=f"TensorFlow said: {str(error) or type(error).__name__}"):
        found = kg.per_example_grad(lambda w, x: ops.sum(w * w * x))(3.0, tensor([1.0, 2.0]))
    close(found, [6.0, 12.0])


def test_an_exception_of_the_function_comes_through_the_vectorizer():
    class OfTheUser(Exception):
        pass

    mine = OfTheUser("as it was raised")

    def loss(w, x):
        raise mine

    with pytest.raises(OfTheUser) as info:
        kg.per_example_grad(loss)(3.0, tensor([1.0, 2.0]))
    assert info.value is mine
    assert mine.__context__ is None
