"""Operators that are used between the steps of a training, where JAX has the weights elsewhere."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_gradtools as kg
from keras_gradtools.curvature import Hessian

RNG = np.random.default_rng(3)
X = RNG.normal(size=(12, 3)).astype("float32")
Y = RNG.normal(size=(12, 2)).astype("float32")
BATCH = 4


def compiled():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4, "tanh"), layers.Dense(2)])
    model.set_weights([np.random.default_rng(i).normal(size=w.shape) for i, w in enumerate(model.get_weights())])
    model.compile(keras.optimizers.Adam(0.1), "mse")
    return model


class Losses(keras.callbacks.Callback):
    """The loss over all data after each step, and the lengths of its gradient and of products."""

    def __init__(self, operator):
        super().__init__()
        self.operator, self.seen = operator, []

    def on_train_batch_end(self, batch, logs=None):
        v = np.ones(self.operator.shape[0], "float32")
        vectors = self.operator.gradient(), self.operator @ v, self.operator.linearized() @ v
        self.seen.append([self.operator.loss(), *map(np.linalg.norm, vectors)])


@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "wrapper"])
def test_the_weights_are_those_of_the_moment(wrapped):
    model, alone = compiled(), compiled()
    trained = model
    if wrapped:
        # A weight of zero: it trains as the model alone does.
        trained = kg.models.InputGradientRegularized(model, 0.0)
        trained.compile(keras.optimizers.Adam(0.1), "mse")
    callback = Losses(Hessian(trained, "mse", (X, Y), verbose=0))
    trained.fit(X, Y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0, callbacks=[callback])

    expected = Losses(Hessian(alone, "mse", (X, Y), verbose=0))
    for start in [*range(0, len(X), BATCH)] * 2:
        alone.train_on_batch(X[start : start + BATCH], Y[start : start + BATCH])
        expected.on_train_batch_end(start)
    np.testing.assert_allclose(callback.seen, expected.seen, rtol=1e-4)
    assert callback.seen[-1][0] < 0.9 * callback.seen[0][0]
    # And the training has gone on as if nobody had looked.
    for found, weight in zip(model.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_allclose(found, weight, rtol=1e-4, atol=1e-6)
