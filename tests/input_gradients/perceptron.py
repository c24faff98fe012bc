"""A perceptron and a model of several inputs, the same in NumPy, and `input_gradient_penalty` of them."""

import keras
import numpy as np
from keras import layers, ops

import keras_gradtools as kg
from tests.input_gradients.reference import numpy

penalty_of = kg.regularization.input_gradient_penalty

RNG = np.random.default_rng(0)
N, D, H, K, T = 4, 3, 4, 2, 3
X = RNG.normal(size=(N, D))
Y = np.eye(K)[[0, 1, 1, 0]]
WEIGHTS = [RNG.normal(size=s) for s in ((D, H), (H,), (H, K), (K,))]
KERNEL = RNG.normal(size=(D, K))
# Single precision holds them exactly.
SAMPLE_WEIGHT = np.array([0.5, 2.0, 1.25, 0.125])
NORMS = [1, 2, "inf"]


def value_and_gradient(model, *args, variables=None, **kwargs):
    with kg.GradientTape() as tape:
        value = penalty_of(model, *args, **kwargs)
    variables = model.trainable_variables if variables is None else variables
    gradients = tape.gradient(value, variables, unconnected_gradients="zero")
    return numpy(value), [numpy(g) for g in gradients]


def perceptron(weights=WEIGHTS, activation="tanh", **kwargs):
    shapes = [w.shape for w in weights]
    model = keras.Sequential(
        [
            keras.Input((shapes[0][0],)),
            layers.Dense(shapes[0][1], activation=activation),
            layers.Dense(shapes[2][1], **kwargs),
        ]
    )
    model.set_weights(weights)
    return model


def forward(weights, xs):
    a, b, c, d = weights
    return np.tanh(xs[0] @ a + b) @ c + d


def cross_entropy(z, y=Y):
    return ((np.log(np.exp(z).sum(axis=-1, keepdims=True)) - z) * y).sum(axis=-1, keepdims=True)


def score(y, y_pred):
    return ops.sum(ops.cast(y, y_pred.dtype) * ops.sin(y_pred), axis=-1)


VALUES = {
    "loss": lambda weights, xs: cross_entropy(forward(weights, xs)),
    "outputs": forward,
    "function": lambda weights, xs: (Y * np.sin(forward(weights, xs))).sum(axis=-1, keepdims=True),
}
TARGETS = {"loss": "loss", "outputs": "outputs", "function": score}


def loss_of_examples():
    return keras.losses.CategoricalCrossentropy(from_logits=True)


A, B, INDICES = RNG.normal(size=(N, D)), RNG.normal(size=(N, 2, 2)), np.array([0, 1, 2, 1])
TWO_INPUTS = [RNG.normal(size=s) for s in ((3, 1), (D, H), (4, H), (H, K))]


def several_inputs(as_list=False):
    a, b, i = keras.Input((D,), name="a"), keras.Input((2, 2), name="b"), keras.Input((), name="i", dtype="int32")
    scale = layers.Embedding(3, 1, name="scale")
    first, second = layers.Dense(H, use_bias=False), layers.Dense(H, use_bias=False)
    last = layers.Dense(K, use_bias=False)
    hidden = ops.tanh(first(a) + second(layers.Flatten()(b))) * scale(i)
    model = keras.Model([a, b, i] if as_list else {"a": a, "b": b, "i": i}, last(hidden))
    for layer, w in zip((scale, first, second, last), TWO_INPUTS, strict=True):
        layer.set_weights([w])
    return model, [layer.trainable_variables[0] for layer in (scale, first, second, last)]
