"""`dense` and `blocks` with a memory budget: the same matrix, by as many rows at once as fit."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_gradtools as kg
from keras_gradtools.curvature.data.data_sums import DataSums

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(12, 5)).astype("float32")
Y = RANDOM.integers(0, 3, size=12)


@pytest.fixture
def operator():
    def make(cls="Hessian", batch_size=5, **options):
        dense = layers.Dense(6, "tanh"), layers.BatchNormalization(), layers.Dropout(0.3, seed=1), layers.Dense(3)
        model = keras.Sequential([keras.Input((5,)), *dense])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        # Few variables, since each has programs of its own.
        last = model.layers[-1]
        return getattr(kg.curvature, cls)(model, loss, (X, Y), last, batch_size=batch_size, verbose=0, **options)

    return make


@pytest.fixture
def asked(monkeypatch):
    """What `dense` asks of its programs: the rows of each call, and how many of them at once."""
    found, rows = [], DataSums.rows

    def spy(self, place, start, size, chunk_size):
        found.append((size, chunk_size))
        return rows(self, place, start, size, chunk_size)

    monkeypatch.setattr(DataSums, "rows", spy)
    return found


@pytest.mark.parametrize(("cls", "training"), [("Hessian", True), ("GaussNewton", False), ("Fisher", False)])
def test_the_matrix_is_the_same_one(operator, cls, training):
    found = operator(cls, training=training)
    expected = found.dense()
    before = [np.array(keras.ops.convert_to_numpy(v)) for v in found.model.variables]
    for given in ({"memory_budget": 1}, {"memory_budget": 30_000}):
        np.testing.assert_allclose(found.dense(**given), expected, rtol=1e-4, atol=1e-6)
    for v, old in zip(found.model.variables, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(v), old)


def test_the_budget_chooses_the_number_of_rows(operator, asked):
    found = operator()
    one, two = found._sums.bytes_of_rows(1), found._sums.bytes_of_rows(2)
    for rows in (1, 7, 64):
        asked.clear()
        # A quarter is for the rows that are returned.
        found.dense(memory_budget=int((one + (rows - 1) * (two - one)) / 0.75) + 8)
        assert {at_once for _, at_once in asked} == {rows}


def test_a_call_returns_no_more_than_a_quarter_of_the_budget(operator, asked):
    found = operator()
    n = found.shape[0]
    found.dense(memory_budget=4 * (3 * n * 4))  # a quarter is three rows of n numbers of 4 bytes
    assert max(size for size, _ in asked) == 3
    assert {at_once for _, at_once in asked} == {1}


def test_a_row_counts_more_where_more_is_computed(operator):
    small, large = (operator(batch_size=size)._sums.bytes_of_rows(1) for size in (3, 12))
    activations = 4 * 9 * (6 + 3)  # of nine more examples, in single precision
    assert large > small + activations


def test_blocks_take_it_too(operator):
    found = operator("GaussNewton")
    expected, blocks = found.blocks(), found.blocks(memory_budget=10_000)
    for row, other in zip(blocks, expected, strict=True):
        for a, b in zip(row, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("given", [{"memory_budget": 0}, {"memory_budget": 1.5}, {"chunk_size": 3, "memory_budget": 9}])
def test_errors_name_the_method(operator, given):
    with pytest.raises(ValueError, match="Hessian.dense expects"):
        operator().dense(**given)
