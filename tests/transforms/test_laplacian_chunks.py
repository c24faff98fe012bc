"""Laplacians and divergences by chunks of their directions: how many at once, and that the value stays the same."""

import types

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools import backend
from keras_gradtools.backend import steps
from keras_gradtools.transforms.taylor import chunks, kinks
from keras_gradtools.transforms.taylor.chunks import Chunks
from tests.cases import close, tensor
from tests.transforms.point_functions import custom, network

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 7)).astype("float32")
MIXED = RNG.normal(size=(7, 7)).astype("float32")


def curved(x):
    """Its Laplacian is that of `expected`."""
    return ops.sum(ops.sin(x), axis=1) * x[:, 0]


def expected(x):
    return -np.sin(x).sum(1) * x[:, 0] + 2 * np.cos(x[:, 0])


@pytest.fixture
def sizes(monkeypatch):
    """The chosen numbers of directions at once. Caches hold stacks for 4 directions of the functions of this file."""
    chosen, size = [], Chunks.size
    monkeypatch.setattr(Chunks, "size", lambda *args: chosen.append(size(*args)) or chosen[-1])
    monkeypatch.setattr(chunks, "_CACHED_BYTES", 4 * X.nbytes)
    monkeypatch.setattr(chunks, "_FEWEST_CACHED", 2)
    monkeypatch.setattr(backend, "threads", lambda: 1)
    return chosen


def numbers(x):
    return ops.convert_to_numpy(ops.stop_gradient(x))


def step(kind, *shape):
    return types.SimpleNamespace(kind=kind, results=[tensor(np.ones(shape))])


@pytest.mark.parametrize(
    ("shape", "count", "at_once"),
    [
        # A stack takes 64 * 64 * 4 bytes for each direction. 512 KiB hold 32 of them.
        ((64, 64), 20, 20),
        ((64, 64), 32, 32),
        ((64, 64), 33, 17),
        ((64, 64), 1000, 32),
        # Chunks of at least 16.
        ((4096, 64), 31, 31),
        ((4096, 64), 32, 16),
        ((4096, 64), 50, 17),
    ],
)
def test_how_many_fit_the_caches(shape, count, at_once, monkeypatch):
    monkeypatch.setattr(backend, "threads", lambda: 1)
    given = [step(steps.ELEMENTWISE, *shape), step(steps.LINEAR, shape[0], 10_000)]
    options = Chunks(memory_budget=10**12, is_last=True)
    assert options.size(given, count) == at_once
    differentiated = options._replace(is_last=False)
    assert differentiated.size(given, count) == (at_once if backend.CHUNKS_ALWAYS_PAY else count)
    monkeypatch.setattr(backend, "threads", lambda: None)
    assert options.size(given, count) == count


@pytest.mark.parametrize(
    ("budget", "pairs", "at_once"),
    # 4000 bytes are computed. A direction takes twice as much.
    [
        (1, False, 1),
        (4000 + 3 * 8000, False, 3),
        (4000 + 3 * 8000 - 1, False, 2),
        (10**9, False, 50),
        (60_000, True, 3),
    ],
)
def test_how_many_fit_the_budget(budget, pairs, at_once):
    given = [step(steps.LINEAR, 10, 50), step(steps.GENERAL, 10, 50)]
    assert Chunks("auto", budget).size(given, 50, pairs) == at_once


def test_chunk_sizes_that_are_given():
    assert [Chunks(size).size(None, 5) for size in (None, 3, 9, "auto")] == [5, 3, 5, 5]


@pytest.mark.parametrize("options", [{}, {"memory_budget": 1}, {"chunk_size": 3}, {"chunk_size": None}], ids=str)
def test_laplacian(options, sizes):
    close(kg.laplacian(curved, **options)(X), expected(X), rtol=1e-4)
    (at_once,) = set(sizes)
    assert at_once == (4 if not options else {1: 1, 3: 3, None: 7}[next(iter(options.values()))])
    close(kg.jit(kg.laplacian(curved, **options))(X), expected(X), rtol=1e-4)


@pytest.mark.parametrize("chunk_size", [2, 3])
@pytest.mark.parametrize("fun", [custom, network("tanh", columns=7, width=5)], ids=["custom gradient", "network"])
def test_chunks_of_coefficients_and_samples(fun, chunk_size):
    each = RNG.normal(size=(4, 7, 7)).astype("float32")
    for coefficients in (MIXED, each, MIXED[0]):
        whole = numbers(kg.laplacian(fun, coefficients=coefficients, chunk_size=None)(X))
        close(kg.laplacian(fun, coefficients=coefficients, chunk_size=chunk_size)(X), whole, rtol=1e-4, atol=1e-4)
    options = {"samples": 5, "seed": 0, "return_standard_error": True}
    for transform in (kg.laplacian, kg.divergence) if fun is custom else (kg.laplacian,):
        wholes = transform(fun, chunk_size=None, **options)(X)
        for found, whole in zip(transform(fun, chunk_size=chunk_size, **options)(X), wholes, strict=True):
            close(found, numbers(whole), rtol=1e-4, atol=1e-4)


def test_divergence(sizes):
    field = lambda x: ops.sin(x) * x[:, :1]  # noqa: E731
    exact = (np.cos(X).sum(1) * X[:, 0] + np.sin(X[:, 0]))[:, None]
    for options in ({}, {"chunk_size": 2}, {"memory_budget": 1}):
        close(kg.divergence(field, **options)(X), exact, rtol=1e-4)
    assert set(sizes) == {1, 2, 4}


def test_derivatives_of_chunks():
    """The gradient by the point, and the biharmonic operator: of r^4 in 7 dimensions it is 8 * 7 * 9."""
    total = lambda x: ops.sum(kg.laplacian(lambda x: ops.sum(ops.sin(x), axis=1), chunk_size=3)(x))  # noqa: E731
    close(kg.grad(total)(tensor(X)), -np.cos(X), rtol=1e-4)
    fourth = lambda x: ops.sum(x**2, axis=1) ** 2  # noqa: E731
    inner = lambda x: kg.laplacian(fourth, chunk_size=3)(x)  # noqa: E731
    close(kg.laplacian(inner, chunk_size=4)(X), np.full(4, 504.0), rtol=1e-4)


def test_a_piecewise_linear_function_in_chunks():
    kinks._warn.cache_clear()
    with pytest.warns(UserWarning, match="piecewise linear"):
        found = kg.laplacian(lambda x: ops.relu(x), chunk_size=2)(X)
    close(found, np.zeros_like(X))


def test_a_layer_that_is_trained(sizes, backend):
    keras.utils.set_random_seed(0)
    x = keras.Input((7,))
    u = keras.Model(x, layers.Dense(1)(layers.Dense(7, "tanh")(x)))
    losses = []
    for options in ({"chunk_size": 2}, {"memory_budget": 1}, {"chunk_size": None}):
        model = keras.Model(x, kg.layers.Laplacian(u, **options)(x))
        model.compile("sgd", "mse")
        losses.append(model.evaluate(X, np.ones((4, 1)), verbose=0))
        copy = keras.Model.from_config(model.get_config())
        assert {k: v for k, v in copy.layers[-1].get_config().items() if k in options} == options
    close(losses, [losses[0]] * 3, rtol=1e-4)
    model.fit(X, np.ones((4, 1)), verbose=0)
    # `fit` on TensorFlow is compiled for any batch size, so that no size is known.
    assert ({2, 7} if backend == "tensorflow" else {1, 2, 7}) <= set(sizes)
