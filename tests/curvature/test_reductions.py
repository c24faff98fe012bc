"""Every reduction of a loss, with batches of different sizes and sample weights, against closed forms in NumPy."""

import functools

import keras
import numpy as np
import pytest
from keras import layers

import keras_gradtools as kg
from keras_gradtools.curvature import Fisher, GaussNewton, Hessian

RNG = np.random.default_rng(11)
N, D, K = 7, 3, 2
X = RNG.normal(size=(N, D)).astype("float32")
T = RNG.normal(size=(N, K)).astype("float32")
WEIGHT = RNG.uniform(0.3, 2.0, N).astype("float32")
KERNEL = RNG.normal(size=(D, K)).astype("float32")
REDUCTIONS = ["sum_over_batch_size", "sum", "mean_with_sample_weight"]
EYE = np.eye(D * K, dtype="float32")
# The batches, of different sizes.
CUTS = [slice(0, 3), slice(3, 7)]


@functools.cache
def linear():
    model = keras.Sequential([keras.Input((D,)), layers.Dense(K, use_bias=False)])
    model.set_weights([KERNEL])
    return model


def weights_in_the_loss(reduction):
    """The factor of each example's mean squared error in N times the loss of all data."""
    factors = []
    for cut in CUTS:
        w = WEIGHT[cut].astype("float64")
        divisor = {"sum": 1.0, "mean_with_sample_weight": w.sum()}.get(reduction, len(w))
        factors.append(len(w) * w / divisor)
    return np.concatenate(factors)


def errors():
    return X.astype("float64") @ KERNEL - T


def second_derivative(reduction):
    """That of the loss by the kernel: it is quadratic, so that the Gauss-Newton and the Fisher matrix are it, too."""
    x = X.astype("float64")
    factors = weights_in_the_loss(reduction)
    return np.einsum("n,nd,ne,kl->dkel", factors, x, x, 2 / K * np.eye(K)).reshape(D * K, D * K) / N


def gradients_of_examples():
    return np.einsum("nd,nk->ndk", X, 2 / K * errors()).reshape(N, -1)


def outer_products(weight=1.0):
    """(1/N) sum w g g'."""
    g = gradients_of_examples()
    return np.einsum("n,na,nb->ab", weight * np.ones(N), g, g) / N


def assert_close(found, desired):
    np.testing.assert_allclose(found, desired, rtol=0, atol=2e-6 * np.abs(desired).max())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["Hessian", "GaussNewton", "exact", "empirical"])
def test_each_matrix(kind, reduction):
    loss = keras.losses.MeanSquaredError(reduction=reduction)
    cls = {"Hessian": Hessian, "GaussNewton": GaussNewton}.get(kind, Fisher)
    options = {"kind": kind} if cls is Fisher else {}
    found = cls(linear(), loss, [(X[cut], T[cut], WEIGHT[cut]) for cut in CUTS], verbose=0, **options)
    # Of labels from the data, each example counts by its own loss, and by its weight: the formula of the docstring.
    expected = outer_products(WEIGHT) if kind == "empirical" else second_derivative(reduction)
    assert_close(found @ EYE, expected)
    if kind == "Hessian":
        # The loss itself is the one that `fit` would have for these batches.
        factors = weights_in_the_loss(reduction)
        np.testing.assert_allclose(found.loss(), (factors * (errors() ** 2).mean(axis=1)).sum() / N, rtol=1e-5)


def test_the_empirical_matrix_of_a_loss_that_sums():
    # In one batch it was N times the others, and N squared times this.
    found = Fisher(linear(), keras.losses.MeanSquaredError(reduction="sum"), (X, T), kind="empirical", verbose=0)
    expected = outer_products()
    assert_close(found.dense(), expected)
    np.testing.assert_allclose(found.trace().value, np.trace(expected), rtol=1e-5)


def test_examples_of_several_places_and_a_weight_of_the_loss():
    x, t = RNG.normal(size=(N, 4, D)).astype("float32"), RNG.normal(size=(N, 4, K)).astype("float32")
    model = keras.Sequential([keras.Input((4, D)), layers.Dense(K, use_bias=False)])
    model.set_weights([KERNEL])
    model.compile(loss=keras.losses.MeanSquaredError(reduction="sum"), loss_weights=[0.5])
    data = [(x[cut], t[cut]) for cut in CUTS]
    # The loss of an example is the sum over its places.
    g = 0.5 * np.einsum("ntd,ntk->ndk", x, 2 / K * (x.astype("float64") @ KERNEL - t)).reshape(N, -1)
    assert_close(Fisher(model, None, data, kind="empirical", verbose=0) @ EYE, g.T @ g / N)


def test_outputs_that_are_reduced_differently():
    inputs = keras.Input((D,))
    model = keras.Model(inputs, [layers.Dense(1, use_bias=False, name=name)(inputs) for name in "ab"])
    model.set_weights([KERNEL[:, :1], KERNEL[:, 1:]])
    losses = [keras.losses.MeanSquaredError(reduction=reduction) for reduction in ("sum", "sum_over_batch_size")]
    model.compile(loss=losses, loss_weights=[0.25, 3.0])
    data = [(X[cut], [T[cut, :1], T[cut, 1:]], WEIGHT[cut]) for cut in CUTS]
    weights = np.array([0.25, 3.0])
    # The weights of both kernels follow each other.
    g = np.einsum("k,nd,nk->nkd", weights, X, 2 * errors()).reshape(N, -1)
    empirical = np.einsum("n,na,nb->ab", WEIGHT, g, g) / N
    assert_close(Fisher(model, None, data, kind="empirical", verbose=0) @ EYE, empirical)
    factors = np.stack([weights_in_the_loss(r) for r in ("sum", "sum_over_batch_size")], axis=1)
    x = X.astype("float64")
    blocks = np.einsum("nk,nd,ne,kl->kdle", factors * weights, x, x, 2 * np.eye(K)).reshape(D * K, D * K) / N
    assert_close(GaussNewton(model, None, data, verbose=0) @ EYE, blocks)


def test_drawn_labels():
    # The same labels are drawn for all: what they are divided by is the size of the batch, 1, or the weights' sum.
    def matrix(reduction):
        loss = keras.losses.MeanSquaredError(reduction=reduction)
        return Fisher(linear(), loss, (X, T, WEIGHT), kind="monte_carlo", samples=3, verbose=0) @ EYE

    assert_close(matrix("sum"), N * matrix("sum_over_batch_size"))
    assert_close(matrix("mean_with_sample_weight"), matrix("sum") / WEIGHT.sum(dtype="float64"))


def test_masked_places_are_no_part_of_a_sum():
    tokens = np.array([[1, 2, 0], [2, 0, 0], [1, 1, 1]])
    model = keras.Sequential([keras.Input((3,), dtype="int32"), layers.Embedding(3, 1, mask_zero=True)])
    model.set_weights([np.array([[5.0], [1.0], [-2.0]])])
    data = [(tokens[:2], np.zeros((2, 3, 1), "float32")), (tokens[2:], np.zeros((1, 3, 1), "float32"))]
    # The loss of an example is the sum of the squares of its embeddings.
    counts = np.array([[0, 1, 1], [0, 0, 1], [0, 3, 0]])
    g = counts * 2 * np.array([5.0, 1.0, -2.0])
    loss = keras.losses.MeanSquaredError(reduction="sum")
    assert_close(Fisher(model, loss, data, kind="empirical", verbose=0) @ np.eye(3), g.T @ g / 3)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_noise_of_the_gradient(reduction):
    # Each example is a batch of one: what it is divided by is 1, or its own weight.
    loss = keras.losses.MeanSquaredError(reduction=reduction)
    found = kg.diagnostics.gradient_noise_scale(linear(), loss, (X, T, WEIGHT))
    weight = np.ones(N) if reduction == "mean_with_sample_weight" else WEIGHT.astype("float64")
    g = weight[:, None] * gradients_of_examples()
    trace = g.var(axis=0, ddof=1).sum()
    np.testing.assert_allclose(found.covariance_trace, trace, rtol=1e-5)
    np.testing.assert_allclose(found.squared_norm, (g.mean(axis=0) ** 2).sum() - trace / N, rtol=1e-5)


@pytest.mark.parametrize("reduction", [None, "none"])
def test_a_loss_that_is_not_reduced(reduction):
    loss = keras.losses.MeanSquaredError(reduction=reduction)
    for cls in (Hessian, GaussNewton, Fisher):
        with pytest.raises(ValueError, match=rf"{cls.__name__} needs a loss that is one number for a batch. .*\(7"):
            cls(linear(), loss, (X, T), verbose=0) @ np.ones(D * K)
    # Which takes a value of each example.
    assert_close(Fisher(linear(), loss, (X, T), kind="empirical", verbose=0) @ EYE, outer_products())
