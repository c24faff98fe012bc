"""Norms of the examples' vectors, the directions that reach them, and their parts, against NumPy."""

import keras
import numpy as np
import pytest

import keras_gradtools as kg
from keras_gradtools import example_norms
from tests.cases import close, tensor
from tests.input_gradients.reference import directions_of, norm_of, numpy

G = np.random.default_rng(0).normal(size=(5, 7))
NORMS = [1, 2, "inf"]
DUAL = {1: "inf", 2: 2, "inf": 1}


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e25])
@pytest.mark.parametrize("norm", NORMS)
class TestEveryScale:
    # The squares of some of these are no numbers in single precision.
    def test_norms(self, norm, scale):
        close(example_norms.norms(tensor(scale * G), norm), scale * norm_of(G, norm), rtol=1e-5, atol=0)

    def test_derivatives_of_norms(self, norm, scale):
        g = tensor(scale * G)
        with kg.GradientTape() as tape:
            tape.watch(g)
            found = example_norms.norms(g, norm)
        close(tape.gradient(found, g), directions_of(G, norm), rtol=1e-5, atol=1e-6)

    def test_directions(self, norm, scale):
        lengths, directions = example_norms.norms_and_directions(tensor(scale * G), norm)
        close(lengths, scale * norm_of(G, norm), rtol=1e-5, atol=0)
        close(directions, directions_of(G, norm), rtol=1e-5, atol=1e-6)
        d = numpy(directions)
        np.testing.assert_allclose((d * scale * G).sum(axis=1), scale * norm_of(G, norm), rtol=1e-5)
        np.testing.assert_allclose(norm_of(d, DUAL[norm]), 1, rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_zero_rows(norm):
    values = G.copy()
    values[[1, 3]] = 0
    g = tensor(values)
    lengths, directions = example_norms.norms_and_directions(g, norm)
    np.testing.assert_array_equal(numpy(directions)[[1, 3]], 0)
    np.testing.assert_array_equal(numpy(lengths)[[1, 3]], 0)
    with kg.GradientTape() as tape:
        tape.watch(g)
        found = example_norms.norms(g, norm)
    np.testing.assert_array_equal(numpy(found)[[1, 3]], 0)
    # Zero there, and what it is by itself for the other rows.
    close(tape.gradient(found, g), directions_of(values, norm), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_ties(norm):
    # Any maximizer would do, as long as it is one: d.g is the norm, at length 1.
    g = np.array([[3.0, -3.0, 0.0], [2.0, 2.0, 2.0]])
    lengths, directions = example_norms.norms_and_directions(tensor(g), norm)
    d = numpy(directions)
    np.testing.assert_allclose((d * g).sum(axis=1), norm_of(g, norm), rtol=1e-6)
    np.testing.assert_allclose(norm_of(d, DUAL[norm]), 1, rtol=1e-6)
    np.testing.assert_allclose(numpy(lengths), norm_of(g, norm), rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_directions_are_constants(norm):
    g = tensor(G)
    with kg.GradientTape(persistent=True) as tape:
        tape.watch(g)
        lengths, directions = example_norms.norms_and_directions(g, norm)
    for constant in (lengths, directions):
        gradient = tape.gradient(constant, g, unconnected_gradients="zero")
        np.testing.assert_array_equal(numpy(gradient), np.zeros_like(G))


def test_one_element():
    for norm in NORMS:
        lengths, directions = example_norms.norms_and_directions(tensor([[-2.0], [0.0], [0.5]]), norm)
        close(lengths, [2, 0, 0.5])
        close(directions, [[-1], [0], [1]])


def test_the_tensors_of_an_example_are_put_side_by_side():
    a, b = G[:, :4].reshape(5, 2, 2), G[:, 4:]
    close(example_norms.flattened([tensor(a), tensor(b)]), G)
    close(example_norms.flattened([tensor(a)]), G[:, :4])
    close(example_norms.flattened([tensor(G[:, 0])]), G[:, :1])


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float16", "float32"),
        ("bfloat16", "float32"),
        ("float32", "float32"),
        pytest.param("float64", "float64", marks=pytest.mark.float64),
    ],
)
def test_half_precision_is_left(dtype, expected, monkeypatch):
    from keras.src.backend.common import dtypes

    # Lets Keras keep what is double: on JAX and torch its operations cast that down.
    monkeypatch.setitem(dtypes.BIT64_TO_BIT32_DTYPE, "float64", "float64")
    mixed = example_norms.flattened([tensor([[0.5]], dtype), tensor([[0.25]], dtype)])
    assert keras.backend.standardize_dtype(mixed.dtype) == expected
    close(mixed, [[0.5, 0.25]])
    # 1e4 squared is beyond half precision.
    close(example_norms.norms(example_norms.flattened([tensor([[30000.0, 40000.0]], dtype)]), 2), [50000], rtol=1e-2)


def test_the_root_of_zero_has_derivative_zero():
    x = tensor([0.0, 4.0])
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = example_norms.root(x)
    close(y, [0, 2])
    close(tape.gradient(y, x), [0, 0.25])


@pytest.mark.parametrize("norm", NORMS)
def test_the_norm_of_nan_is_nan(norm):
    found = numpy(example_norms.norms(tensor([[np.nan, 1.0], [3.0, 0.0]]), norm))
    assert np.isnan(found[0]) and found[1] == 3


class TestSeveralTensors:
    def test_splitting_undoes_flattening(self):
        like = [tensor(np.zeros((5, 2, 2))), tensor(np.zeros((5, 3)))]
        first, second = example_norms.split(G, like)
        close(first, G[:, :4].reshape(5, 2, 2))
        close(second, G[:, 4:])
        close(example_norms.flattened([first, second]), G)

    def test_normalized(self):
        parts = example_norms.split(np.vstack([G, np.zeros((1, 7))]), [tensor(np.zeros((6, n))) for n in (3, 4)])
        close(example_norms.squares(parts), [*(G**2).sum(axis=1), 0])
        directions, lengths = example_norms.normalized(parts)
        close(lengths, [*np.linalg.norm(G, axis=1), 0])
        expected = np.vstack([G / np.linalg.norm(G, axis=1, keepdims=True), np.zeros((1, 7))])
        close(example_norms.flattened(directions), expected)

    def test_one_number_for_each_example(self):
        x = tensor(np.ones((2, 3, 1)))
        assert tuple(example_norms.for_each(tensor([1.0, 2.0]), x).shape) == (2, 1, 1)
        close(example_norms.scaled(tensor([1.0, 2.0]), x), [[[1]] * 3, [[2]] * 3])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int32"])
def test_numbers_are_in_double_precision(dtype):
    found = example_norms.numbers(tensor([[1.0, -2.0]], dtype))
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, [[1, -2]])
