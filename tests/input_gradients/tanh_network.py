"""A tanh network in NumPy, its input gradients, and the penalties on them, in double precision.

The network is `tanh(x A + a) B + b`. A target is a tuple of numbers for each example, each with its gradient by the
network's outputs; the reference of a penalty follows the formulas of the docstring, with no code of the package.
"""

import typing

import keras
import numpy as np
from keras import layers, ops

from tests.cases import central_differences

RNG = np.random.default_rng(7)
N, D, H, K = 8, 4, 5, 3
X = RNG.normal(size=(N, D)).astype("float32")
Y = RNG.integers(0, K, N)
NETWORK = [RNG.normal(size=shape, scale=0.7).astype("float32") for shape in ((D, H), (H,), (H, K), (K,))]


def network(weights=NETWORK, activation="tanh", **kwargs):
    """The network as a Keras model."""
    model = keras.Sequential([keras.Input((D,)), layers.Dense(H, name="hidden"), layers.Dense(K, name="out")], **kwargs)
    model.layers[0].activation = keras.activations.get(activation)
    model.set_weights(weights)
    return model


def outputs(weights, x):
    a, b, c, d = weights
    return np.tanh(x @ a + b) @ c + d


def jacobian(weights, x):
    """The derivatives of the outputs by the inputs, of shape `(N, K, D)`."""
    a, b, c, _ = weights
    return np.einsum("dh,nh,hk->nkd", a, 1 - np.tanh(x @ a + b) ** 2, c)


# --- what is differentiated: `values(z) -> (N, P)` and their gradients by z, `(N, P, K)` ---


class Target(typing.NamedTuple):
    values: typing.Callable
    gradients: typing.Callable


def cross_entropy(y=Y):
    def values(z):
        return (np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(y)), y])[:, None]

    def gradients(z):
        p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
        return (p - np.eye(K)[y])[:, None]

    return Target(values, gradients)


def mixtures(v):
    """Weighted sums of the outputs, `v` of shape `(P, N, K)`."""
    v = np.moveaxis(v, 0, 1)
    return Target(lambda z: np.einsum("npk,nk->np", v, z), lambda z: v)


def all_outputs():
    return Target(lambda z: z, lambda z: np.broadcast_to(np.eye(K), (len(z), K, K)))


def margin(y=Y):
    v = np.eye(K)[y] - np.eye(K)[(y + 1) % K]
    return Target(lambda z: np.sum(v * z, axis=1)[:, None], lambda z: v[:, None])


@keras.saving.register_keras_serializable(package="tests_input_gradients")
def keras_margin(y, y_pred):
    """The same `margin` in Keras."""
    y = ops.reshape(y, (-1,))
    v = ops.one_hot(y, K, dtype=y_pred.dtype) - ops.one_hot((y + 1) % K, K, dtype=y_pred.dtype)
    return ops.sum(v * y_pred, axis=-1)


def drawn_mixtures(seeds, count, batch_size=N):
    """The mixtures of outputs that the next step of a wrapper with these seeds draws."""
    v = ops.convert_to_numpy(keras.random.normal((count, batch_size, K), seed=seeds)).astype("float64")
    return mixtures(v / np.linalg.norm(v, axis=2, keepdims=True) * np.sqrt(K / count))


# --- the penalty ---


def norm_of(g, order):
    return np.linalg.norm(g, ord=np.inf if order == "inf" else order, axis=1)


def direction_of(g, order):
    if order == 1:
        return np.sign(g)
    if order == "inf":
        return np.eye(g.shape[1])[np.abs(g).argmax(axis=1)] * np.sign(g)
    return g / np.linalg.norm(g, axis=1, keepdims=True)


class Reference(typing.NamedTuple):
    """A penalty, by its options."""

    target: Target
    method: str = "exact"
    norm: typing.Any = 2
    squared: bool = True
    center: float = 0.0
    step_size: float = 0.1

    def gradients(self, weights, x):
        """Of shape `(N, P, D)`."""
        return np.einsum("npk,nkd->npd", self.target.gradients(outputs(weights, x)), jacobian(weights, x))

    def norms(self, weights, x):
        return norm_of(self.gradients(weights, x).reshape(len(x), -1), self.norm)

    def examples(self, weights, x, at=None):
        """The penalty of each example, the direction of finite differences being that of the weights `at`."""
        if self.method != "finite_difference":
            return self._of(self.norms(weights, x))
        g = self.gradients(weights if at is None else at, x)
        values = self.target.values(outputs(weights, x))
        quotients = np.empty_like(values)
        for p in range(values.shape[1]):
            further = self.target.values(outputs(weights, x + self.step_size * direction_of(g[:, p], self.norm)))
            quotients[:, p] = (further - values)[:, p] / self.step_size
        return self._of(quotients[:, 0] if quotients.shape[1] == 1 else norm_of(quotients, self.norm))

    def _of(self, norms):
        distance = norms - self.center
        return distance**2 if self.squared else np.abs(distance)


class Step(typing.NamedTuple):
    """What is known before a training step, and the weights after it."""

    loss: float
    penalty: float
    norm: float
    after: list


def sgd_step(reference, weights, weight, rate, x=X, loss=None, w=1.0):
    """A step of gradient descent on the mean of `loss` and of `weight` times the penalty, both weighted by `w`."""
    at = [v.astype("float64") for v in weights]
    x = x.astype("float64")
    loss = loss or cross_entropy()

    def losses(weights):
        return np.mean(w * loss.values(outputs(weights, x))[:, 0])

    def penalty(weights):
        return np.mean(w * reference.examples(weights, x, at))

    gradients = central_differences(lambda v: losses(v) + weight * penalty(v), at)
    after = [v - rate * g for v, g in zip(at, gradients, strict=True)]
    norm = np.mean(reference.norms(at, x))
    return Step(losses(at) + weight * penalty(at), penalty(at), norm, after)
