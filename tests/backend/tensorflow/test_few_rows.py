"""Jacobians of an eager tape: a few rows one by one, more of them vectorized, with the same results."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from tests.cases import close, tensor

if keras.config.backend() != "tensorflow":
    pytest.skip("only TensorFlow vectorizes by tracing a graph", allow_module_level=True)

import tensorflow as tf

from keras_gradtools.backend.tensorflow import vectorize

ROWS = vectorize._MOST_EAGER_ROWS


@pytest.fixture(params=["one by one", "vectorized"])
def calls_of_the_vectorizer(request, monkeypatch):
    """The shapes of what was vectorized."""
    calls, vectorized = [], vectorize.vectorize

    def noted(fun, stacks):
        calls.append(stacks[0].shape)
        return vectorized(fun, stacks)

    monkeypatch.setattr(vectorize, "vectorize", noted)
    if request.param == "vectorized":
        monkeypatch.setattr(vectorize, "_MOST_EAGER_ROWS", 0)
    yield calls
    assert bool(calls) == (request.param == "vectorized")


def cubes(x):
    return x**3


@kg.custom_gradient
def square(x):
    return x * x, lambda u: 2 * x * u


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("fun", [cubes, lambda x: x * square(x), lambda x: ops.cumsum(x**3) - ops.cumsum(x**3) + x**3])
def test_jacobian(fun, mode, calls_of_the_vectorizer):
    x = np.array([1.0, 2.0, -1.5, 0.5], "float32")
    with kg.GradientTape() as tape:
        x_tensor = tensor(x)
        tape.watch(x_tensor)
        y = fun(x_tensor)
    close(tape.jacobian(y, x_tensor, mode=mode), np.diag(3 * x**2))


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_batch_jacobian_of_a_recurrent_model(mode, calls_of_the_vectorizer):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3, 2)), keras.layers.GRU(4), keras.layers.Dense(5, "tanh")])
    x = keras.random.normal((6, 3, 2), seed=1)
    with kg.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = model(x)
        outputs = ops.unstack(y, axis=1)
    expected = np.stack([tape.gradient(output, x) for output in outputs], 1)
    close(tape.batch_jacobian(y, x, mode=mode), expected)


def test_unconnected_sources_and_parts_of_a_model(calls_of_the_vectorizer):
    a, b, c = tensor([1.0, 2.0]), tensor([3.0, 4.0]), tensor([5.0])
    with kg.GradientTape(persistent=True) as tape:
        tape.watch([a, b, c])
        y, z = a * b, b * b
    assert tape.jacobian(y, c) is None
    close(tape.jacobian(y, [a, b]), [np.diag([3.0, 4.0]), np.diag([1.0, 2.0])])
    by_a, by_b, by_c = tape.jacobian(z, [a, b, c])
    assert by_a is None and by_c is None
    close(by_b, np.diag([6.0, 8.0]))


def test_an_outer_tape_differentiates_it(calls_of_the_vectorizer):
    w, x = keras.Variable([1.0, -2.0]), tensor([[3.0, 0.5], [1.0, 2.0], [0.1, 0.3]])
    with kg.GradientTape() as outer:
        with kg.GradientTape() as inner:
            inner.watch(x)
            y = w * x**2
        norm = ops.sum(inner.batch_jacobian(y, x) ** 2)  # sum of (2 w x)^2
    close(outer.gradient(norm, w), 8 * np.array([1.0, -2.0]) * np.sum(ops.convert_to_numpy(x) ** 2, 0))


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_more_rows_are_vectorized(mode, monkeypatch):
    counts, vectorized = [], vectorize.vectorize
    monkeypatch.setattr(
        vectorize, "vectorize", lambda fun, stacks: counts.append(stacks[0].shape[0]) or vectorized(fun, stacks)
    )
    for count in (ROWS, ROWS + 1):
        x = ops.linspace(0.0, 1.0, count)
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = ops.sin(x)
        close(tape.jacobian(y, x, mode=mode), np.diag(np.cos(np.linspace(0.0, 1.0, count))))
    assert counts == [ROWS + 1]


def test_large_tensors_are_vectorized(monkeypatch):
    counts, vectorized = [], vectorize.vectorize
    monkeypatch.setattr(
        vectorize, "vectorize", lambda fun, stacks: counts.append(stacks[0].shape[0]) or vectorized(fun, stacks)
    )
    w = tf.ones((2, 2**18))
    with kg.GradientTape() as tape:
        tape.watch(w)
        y = tf.reduce_sum(w, 1)
    assert ops.convert_to_numpy(tape.jacobian(y, w)).sum() == 2 * 2**18
    assert counts == [2]
