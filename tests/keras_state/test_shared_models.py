"""One model that several threads use at once, each in its own way: nobody sees what the others do."""

import functools
import threading

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.keras_state import layer_calls
from keras_gradtools.keras_state.layer_state import frozen_statistics

THREADS = 8
RNG = np.random.default_rng(7)
X = RNG.normal(size=(6, 3)).astype("float32")
W = RNG.normal(size=(3, 2)).astype("float32")
GAMMA, MEAN, VARIANCE = (
    np.array([2.0, 3.0], "float32"),
    np.array([1.0, -1.0], "float32"),
    np.array([3.0, 0.5], "float32"),
)


def normalized():
    """x W, normalized: of which every way of calling it has a closed form."""
    norm = layers.BatchNormalization(epsilon=0.0, center=False, name="norm")
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, use_bias=False, name="dense"), norm])
    model.set_weights([W, GAMMA, MEAN, VARIANCE])
    return model


def frozen_penalty(model):
    # The squared norm of the Jacobian, which is that of an example where the statistics are constants.
    penalty = kg.regularization.input_gradient_penalty(
        model, X, target="outputs", method="exact", frozen_statistics=True, training=True
    )
    return penalty, np.sum((W * GAMMA / np.sqrt(VARIANCE)) ** 2)


def gradient(model):
    def total(x):
        return ops.sum(model(x, training=False))

    return kg.grad(total)(ops.convert_to_tensor(X)), np.tile((W * GAMMA / np.sqrt(VARIANCE)).sum(axis=1), (6, 1))


def product(model):
    def squares(x):
        return ops.sum(ops.square(model(x, training=False))) / 2

    a = W * GAMMA / np.sqrt(VARIANCE)
    return kg.hvp(squares, (ops.convert_to_tensor(X),), (ops.ones((6, 3)),))[0], np.ones((6, 3)) @ a @ a.T


def mixing(model):
    # Whose verdict is wrong as soon as another thread freezes the statistics.
    with keras.StatelessScope():
        found = kg.diagnostics.batch_independence(lambda x: model(x, training=True), X)
    return np.float32(found.independent), 0.0


def seen(model):
    with layer_calls.recorded(model) as calls:
        model(X, training=False)
    return np.float32(len([call for call in calls if call.layer.name in ("dense", "norm")])), 2.0


WAYS = [frozen_penalty, gradient, product, mixing, seen]


def run_together(works, times):
    """What is wrong in the results of functions that each run on a thread, `times` times."""
    wrong, start = [], threading.Barrier(len(works))

    def repeat(work):
        start.wait()
        for _ in range(times):
            try:
                value, expected = work()
                np.testing.assert_allclose(ops.convert_to_numpy(value), expected, rtol=2e-3, atol=1e-3)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=repeat, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


@pytest.mark.parametrize(
    "times", [2, pytest.param(125, marks=pytest.mark.slow)], ids=["a few calls", "a thousand calls"]
)
def test_threads_that_share_a_model(times):
    model = normalized()
    for way in WAYS:
        way(model)
    keras_call = keras.Layer.__call__
    works = [functools.partial(WAYS[i % len(WAYS)], model) for i in range(THREADS)]
    wrong = run_together(works, times)
    assert not wrong, f"{len(wrong)} of {THREADS * times} calls: {wrong[0]}"
    assert keras.Layer.__call__ is keras_call
    assert model.get_layer("norm").trainable


def test_statistics_are_frozen_on_the_thread_that_asks():
    model, seen_elsewhere = normalized(), []
    norm = model.get_layer("norm")
    with frozen_statistics(model):
        assert not norm.trainable
        thread = threading.Thread(target=lambda: seen_elsewhere.append(norm.trainable))
        thread.start()
        thread.join()
    assert seen_elsewhere == [True] and norm.trainable
    norm.trainable = False
    with frozen_statistics(model):
        pass
    assert not norm.trainable
