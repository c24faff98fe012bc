"""Random programs of layers, variables, containers and Python, each in Keras and, in double precision, in NumPy.

A program is a chain of steps on a table of three examples with four features. Its arguments are a nesting of weights
with None in it, and the table. Whatever a step reads and assigns is made anew for each program.
"""

import keras
import numpy as np
from keras import layers, ops

import keras_gradtools as kg

SHAPE = (3, 4)
# Large enough for second derivatives that single precision can hold.
EPSILON = 0.1
STEPS: dict = {}


def step(name):
    """Enters a step: a function that makes `(in Keras, in NumPy)`, both of `(x, weights)`, with random numbers."""

    def enter(make):
        STEPS[name] = make
        return make

    return enter


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@step("dense")
def dense(random):
    def in_keras(x, w):
        y = ops.matmul(x, w["kernel"])
        return ops.tanh(y if w["bias"] is None else y + w["bias"])

    def in_numpy(x, w):
        y = x @ w["kernel"]
        return np.tanh(y if w["bias"] is None else y + w["bias"])

    return in_keras, in_numpy


@step("batch normalization, training")
def batch_normalization(random):
    layer = layers.BatchNormalization(epsilon=EPSILON, center=False, scale=False)

    def in_keras(x, w):
        return layer(x, training=True) * w["pair"][0]

    def in_numpy(x, w):
        return (x - x.mean(0)) / np.sqrt(x.var(0) + EPSILON) * w["pair"][0]

    return in_keras, in_numpy


@step("batch normalization, inference")
def frozen_batch_normalization(random):
    layer = layers.BatchNormalization(epsilon=EPSILON, center=False, scale=False)
    layer.build((None, SHAPE[1]))
    mean, variance = random.normal(size=4), random.uniform(0.5, 2, size=4)
    layer.set_weights([mean, variance])

    def in_numpy(x, w):
        return (x - mean) / np.sqrt(variance + EPSILON)

    return lambda x, w: layer(x, training=False), in_numpy


@step("layer normalization")
def layer_normalization(random):
    layer = layers.LayerNormalization(epsilon=EPSILON, center=False, scale=False)

    def in_numpy(x, w):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPSILON)

    return lambda x, w: layer(x), in_numpy


@step("attention")
def attention(random):
    def in_keras(x, w):
        heads = ops.reshape(x, (1, 3, 1, 4))
        return ops.reshape(ops.dot_product_attention(heads, ops.sin(heads), heads), SHAPE)

    return in_keras, lambda x, w: softmax(x @ np.sin(x).T / 2) @ x


@step("attention, a layer")
def attention_layer(random):
    layer = layers.Attention()

    def in_keras(x, w):
        return layer([x[None], ops.tanh(x)[None]])[0]

    return in_keras, lambda x, w: softmax(x @ np.tanh(x).T) @ np.tanh(x)


@step("an empty axis")
def empty_axis(random):
    def in_keras(x, w):
        nothing = x[:, :0]
        return ops.concatenate([x, ops.exp(nothing)], axis=1) + ops.sum(nothing) + ops.prod(nothing, axis=1)[:, None]

    return in_keras, lambda x, w: x + 1


@step("loops and branches")
def python(random):
    count = int(random.integers(0, 4))

    def of(sin):
        def fun(x, w):
            for i in range(count):
                x = x + sin(x) / (i + 2)
            return -x if count % 2 else x

        return fun

    return of(ops.sin), of(np.sin)


@step("a variable, read, assigned and read again")
def variable(random):
    value = random.uniform(0.5, 1, size=4)
    state = keras.Variable(value, dtype="float32")

    def in_keras(x, w):
        x = x * state
        state.assign(0.5 * state + 0.2)
        return x + state

    return in_keras, lambda x, w: x * value + 0.5 * value + 0.2


@step("aliases")
def aliases(random):
    def in_keras(x, w):
        y = ops.reshape(ops.cast(ops.convert_to_tensor(x), x.dtype), SHAPE)
        return ops.tanh(ops.transpose(ops.transpose(y)) * x + y)

    return in_keras, lambda x, w: np.tanh(x * x + x)


@step("nested containers")
def containers(random):
    def inner(tree):
        first, (nothing, [second]) = tree["a"], tree["b"]
        assert nothing is None
        return {"sum": first + second, "nothing": None}

    def in_keras(x, w):
        return inner({"a": x, "b": (None, [ops.sin(x)])})["sum"]

    return in_keras, lambda x, w: x + np.sin(x)


@step("a custom gradient")
def custom_gradient(random):
    sin = kg.custom_gradient(lambda x: (ops.sin(x), lambda upstream: upstream * ops.cos(x)))
    return lambda x, w: sin(x), lambda x, w: np.sin(x)


@step("a gradient inside")
def gradient_inside(random):
    def in_keras(x, w):
        return x + kg.grad(lambda z: ops.sum(ops.cos(z) * w["pair"][0]))(x)

    return in_keras, lambda x, w: x - np.sin(x) * w["pair"][0]


@step("a compiled function")
def compiled(random):
    fun = kg.jit(lambda x: ops.softplus(x) - 0.5)
    return lambda x, w: fun(x), lambda x, w: np.log1p(np.exp(x)) - 0.5


@step("a choice by a constant mask")
def choice(random):
    mask = random.random(SHAPE) < 0.5
    return lambda x, w: ops.where(mask, ops.sin(x), x), lambda x, w: np.where(mask, np.sin(x), x)


class Program:
    """One program, by its seed: `in_keras` and `in_numpy` return one number, for `(weights, x)`."""

    def __init__(self, seed):
        random = np.random.default_rng(seed)
        self.names = [str(name) for name in random.choice(list(STEPS), size=random.integers(2, 6))]
        self._steps = [STEPS[name](random) for name in self.names]
        self._u = random.normal(size=SHAPE)
        bias = None if random.random() < 0.5 else 0.3 * random.normal(size=4)
        self.weights = {"kernel": 0.5 * random.normal(size=(4, 4)), "bias": bias, "pair": (random.normal(size=4), None)}
        self.x = random.normal(size=SHAPE)
        self.directions = [self._direction(random) for _ in range(2)]

    def _direction(self, random):
        return mapped(lambda a: random.normal(size=a.shape), (self.weights, self.x))

    def in_keras(self, weights, x):
        for apply, _ in self._steps:
            x = apply(x, weights)
        return ops.sum(x * ops.cast(self._u, x.dtype))

    def in_numpy(self, weights, x):
        for _, apply in self._steps:
            x = apply(x, weights)
        return float(np.sum(x * self._u))

    def along(self, *steps):
        """The value in NumPy at the arguments moved along each direction by its step."""
        moved = self.weights, self.x
        for direction, h in zip(self.directions, steps, strict=False):
            moved = mapped(lambda a, d, h=h: a + h * d, moved, direction)
        return self.in_numpy(*moved)


def mapped(fun, tree, *others):
    """`fun` of each leaf but None."""
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {key: mapped(fun, tree[key], *(other[key] for other in others)) for key in tree}
    if isinstance(tree, tuple):
        return tuple(mapped(fun, *parts) for parts in zip(tree, *others, strict=True))
    return fun(tree, *others)
