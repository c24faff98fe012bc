"""A small classifier and linear models, their curvature operators, and the matrices that these are.

The matrices are computed in NumPy, in double precision, out of a forward pass written by hand: first derivatives by
complex steps, which are exact, and second ones by central differences of these.
"""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_gradtools.curvature import Fisher, GaussNewton, Hessian

RNG = np.random.default_rng(3)
N, D, W, K = 37, 3, 4, 3
SHAPES = [(D, W), (W,), (W, K), (K,)]
SIZE = sum(int(np.prod(shape)) for shape in SHAPES)
# In single precision, so that models of both precisions are the same.
X = RNG.normal(size=(N, D)).astype("float32")
Y = RNG.integers(0, K, N)
T = RNG.normal(size=(N, K)).astype("float32")
B = RNG.integers(0, 2, (N, K)).astype("float32")
SAMPLE_WEIGHT = RNG.uniform(0.2, 2.0, N).astype("float32")
THETA = RNG.normal(scale=0.7, size=SIZE).astype("float32")
V = RNG.normal(size=SIZE).astype("float32")
QUIET = {"verbose": 0}
DTYPES = ["float32", pytest.param("float64", marks=pytest.mark.float64)]
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


# --- the references ---


def split(theta, shapes=SHAPES):
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(np.split(theta, ends[:-1]), shapes, strict=True)]


def forward(theta, x=X):
    w1, b1, w2, b2 = split(theta)
    return np.tanh(x @ w1 + b1) @ w2 + b2


def cross_entropies(z, y=Y):
    return np.log(np.exp(z).sum(axis=-1)) - np.take_along_axis(z, y[..., None], axis=-1)[..., 0]


def squares(z):
    return ((z - T) ** 2).mean(axis=-1)


def jacobian(fun, theta):
    """The Jacobian of `fun`, of shape `(*out, n)`, by complex steps."""
    steps = np.asarray(theta, "float64") + 1e-30j * np.eye(len(theta))
    return np.stack([fun(step).imag for step in steps], axis=-1) / 1e-30


def hessian(fun, theta, eps=1e-5):
    theta = np.asarray(theta, "float64")
    above = [jacobian(fun, theta + e) for e in eps * np.eye(len(theta))]
    below = [jacobian(fun, theta - e) for e in eps * np.eye(len(theta))]
    return (np.stack(above) - np.stack(below)) / (2 * eps)


def softmax(z):
    p = np.exp(z - z.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def curvature_of_cross_entropies(z):
    p = softmax(z)
    return p[..., None] * np.eye(p.shape[-1]) - p[..., :, None] * p[..., None, :]


def curvature_of_squares(z):
    return np.broadcast_to(2 / K * np.eye(K), (len(z), K, K))


VALUES = {"cross-entropy": cross_entropies, "mse": squares}
CURVATURES = {"cross-entropy": curvature_of_cross_entropies, "mse": curvature_of_squares}


def mean_loss(loss, theta, weight=1.0, network=forward):
    return (weight * VALUES[loss](network(theta))).mean()


@functools.cache
def hessian_reference(loss, is_weighted=False):
    return hessian(functools.partial(mean_loss, loss, weight=SAMPLE_WEIGHT if is_weighted else 1.0), THETA)


@functools.cache
def gauss_newton_reference(loss, is_weighted=False):
    weight = SAMPLE_WEIGHT if is_weighted else np.ones(N)
    j = jacobian(forward, THETA)
    return np.einsum("n,nka,nkl,nlb->ab", weight, j, CURVATURES[loss](forward(THETA.astype("float64"))), j) / N


@functools.cache
def empirical_reference(loss, is_weighted=False):
    g = jacobian(lambda theta: VALUES[loss](forward(theta)), THETA)
    return np.einsum("n,na,nb->ab", SAMPLE_WEIGHT if is_weighted else np.ones(N), g, g) / N


REFERENCES = {
    "Hessian": hessian_reference,
    "GaussNewton": gauss_newton_reference,
    "Fisher": gauss_newton_reference,
    "empirical": empirical_reference,
}


def assert_close(found, desired, tolerance=1e-5):
    """Relative to the largest element, as sums of products round."""
    found = ops.convert_to_numpy(found) if ops.is_tensor(found) else found
    assert found.shape == np.shape(desired)
    np.testing.assert_allclose(found.astype("float64"), desired, rtol=0, atol=tolerance * np.abs(desired).max())


# --- the operators ---


# What is compiled is kept with the model, by the loss: most of the time would go there.
def mlp(dtype="float32", activation=None, l2=None):
    return _mlp(dtype, activation, l2)


@functools.cache
def _mlp(dtype, activation, l2):
    if dtype == "float64" and keras.config.backend() != "tensorflow":
        pytest.skip("Keras' products and activations are in single precision on JAX and torch")
    model = keras.Sequential(
        [
            keras.Input((D,), dtype=dtype),
            layers.Dense(W, "tanh", dtype=dtype, kernel_regularizer=l2 and keras.regularizers.L2(l2), name="hidden"),
            layers.Dense(K, activation, dtype=dtype, name="out"),
        ]
    )
    model.set_weights(split(THETA))
    return model


def loss_of(name, dtype="float32", from_logits=True):
    return _loss_of(name, dtype, from_logits)


@functools.cache
def _loss_of(name, dtype, from_logits):
    if name == "mse":
        return keras.losses.MeanSquaredError(dtype=dtype)
    return keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits, dtype=dtype)


@functools.cache
def operator(kind, loss="cross-entropy", dtype="float32", is_weighted=False, batch_size=256):
    data = (X.astype(dtype), Y if loss == "cross-entropy" else T.astype(dtype))
    data += (SAMPLE_WEIGHT.astype(dtype),) if is_weighted else ()
    cls = {"Hessian": Hessian, "GaussNewton": GaussNewton}.get(kind, Fisher)
    options = {"kind": "empirical"} if kind == "empirical" else {}
    return cls(mlp(dtype), loss_of(loss, dtype), data, batch_size=batch_size, **QUIET, **options)


def matrix_of(operator):
    """Its products with all unit vectors, which is one program where `dense` is one for each variable."""
    return operator @ np.eye(operator.shape[0])


def assert_is(found, matrix, tolerance=1e-5):
    """Asserts that an operator is this matrix, by the product with a vector in general position: one small program."""
    assert found.shape == matrix.shape
    v = np.resize(V, len(matrix))
    assert_close(found @ v, matrix @ v, tolerance)


def linear(units=1, size=D, activation=None, **kwargs):
    model = keras.Sequential([keras.Input((size,)), layers.Dense(units, activation, use_bias=False, **kwargs)])
    model.set_weights([np.linspace(-1, 1, size * units, dtype="float32").reshape(size, units)])
    return model


def of_linear(x, curvatures):
    """J' H J / N of z = x W, for the curvatures `(N, K, K)` of the loss by z."""
    n = x.shape[1] * curvatures.shape[1]
    x = x.astype("float64")
    return np.einsum("nd,ne,nkl->dkel", x, x, curvatures).reshape(n, n) / len(x)
