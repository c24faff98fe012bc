"""A small network with tanh, data for it, and its training by `SecondOrder` with all of the data in one batch."""

import keras
import numpy as np
from keras import layers

from keras_gradtools.models import SecondOrder

RNG = np.random.default_rng(2)
X = RNG.normal(size=(40, 3)).astype("float32")
T = np.sin(2.0 * X[:, :1]) + X[:, 1:2] * X[:, 2:]


def network(units=6, dtype="float32"):
    model = keras.Sequential(
        [keras.Input((3,)), layers.Dense(units, "tanh", dtype=dtype), layers.Dense(1, dtype=dtype)]
    )
    draw = np.random.default_rng(1)
    model.set_weights([0.5 * draw.normal(size=w.shape) for w in model.get_weights()])
    return model


def trainer_of(model, optimizer, loss="mse"):
    trainer = SecondOrder(model)
    trainer.compile(optimizer, loss)
    return trainer


def fit(trainer, epochs, x=X, y=T):
    return trainer.fit(x, y, batch_size=len(x), epochs=epochs, shuffle=False, verbose=0).history


def assert_same_weights(model, weights):
    """Bit for bit."""
    for a, b in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(a, b)
