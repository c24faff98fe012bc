"""Functions of points, for the tests of forward passes that carry several derivatives."""

import keras
import numpy as np
from keras import layers, ops

import keras_gradtools as kg


def network(activation, *last, columns=2, width=6):
    """A network with two hidden layers and two outputs, with the same weights on every backend."""
    hidden = [layers.Dense(width, activation) for _ in range(2)]
    model = keras.Sequential([keras.Input((columns,)), *hidden, *last, layers.Dense(2)])
    rng = np.random.default_rng(1)
    for v in model.trainable_variables:
        v.assign(0.5 * rng.normal(size=v.shape))
    return model


def attention(x):
    """A small transformer of the coordinates: one token for each."""
    tokens = ops.stack([ops.sin(x), ops.cos(2 * x), x], axis=2)
    scores = ops.softmax(ops.matmul(tokens, ops.transpose(tokens, (0, 2, 1))), axis=-1)
    return ops.sum(ops.tanh(ops.matmul(scores, tokens)), axis=1)


def custom(x):
    """The gradient of the rounded factor is not that of its value."""
    straight = kg.straight_through(lambda x: ops.round(4 * x) / 4)
    return ops.sin(straight(x) * x) + kg.stop_gradient(x) * x**2
