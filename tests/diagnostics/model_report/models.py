"""Small models with one fault each, and their data."""

import keras
import numpy as np
from keras import layers

RNG = np.random.default_rng(0)
X = RNG.uniform(size=(12, 4)).astype("float32")
Y = np.arange(12) % 2


def compiled(name, *parts, loss=None, rate=0.01, shape=(4,)):
    model = keras.Sequential([keras.Input(shape), *parts], name=name)
    model.compile(keras.optimizers.SGD(rate), loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def good(**options):
    """A linear classifier of the first two inputs."""
    model = compiled("good", layers.Dense(2, name="out"), **options)
    model.set_weights([np.array([[2.0, 0.0], [0.0, 2.0], [0.5, 0.0], [0.0, 0.5]]), np.zeros(2)])
    return model


def normalized():
    return compiled("normalized", layers.Dense(3, "tanh"), layers.BatchNormalization(name="norm"), layers.Dense(2))


def dead():
    model = compiled("dead", layers.Dense(10, "relu", name="hidden"), layers.Dense(2, name="out"))
    kernel, bias, *rest = model.get_weights()
    model.set_weights([np.abs(kernel), np.where(np.arange(10) < 6, -50.0, 0.0), *rest])
    return model


def vanishing():
    hidden = [layers.Dense(4, "sigmoid", name=f"hidden_{i}") for i in range(9)]
    return compiled("vanishing", *hidden, layers.Dense(2, name="out"))


def overflowing():
    model = compiled("overflowing", layers.Dense(2, "exponential", name="grows"), layers.Dense(2, name="out"))
    model.set_weights([np.full((4, 2), 300.0), np.zeros(2), np.ones((2, 2)), np.zeros(2)])
    return model
