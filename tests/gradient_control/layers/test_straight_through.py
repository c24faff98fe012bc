"""`StraightThrough` in a model."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_gradtools import layers
from tests.cases import close, tensor


@keras.saving.register_keras_serializable(package="tests_straight_through")
def step(x):
    return x > 0


def test_a_binary_unit_is_trained():
    dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    model = keras.Sequential([keras.Input((1,)), dense, layers.StraightThrough(step)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(np.array([[3.0]]), np.array([[0.0]]), verbose=0)
    # The output is 1, whose loss has the gradient 2.
    close(dense.kernel, [[1 - 0.1 * 2 * 3]])


@pytest.mark.parametrize(("fun", "values"), [(step, [1, 0]), (keras.activations.relu, [2.7, 0])])
def test_is_saved_with_its_function(fun, values, tmp_path):
    inputs = keras.Input((2,))
    model = keras.Model(inputs, layers.StraightThrough(fun)(inputs))
    model.save(tmp_path / "model.keras")
    close(keras.models.load_model(tmp_path / "model.keras")(tensor([[2.7, -1.0]])), [values])


def test_refuses_what_is_no_function():
    with pytest.raises(ValueError, match="straight_through takes a function. Received: 'relu'"):
        layers.StraightThrough("relu")


def test_refuses_a_change_of_shape():
    with pytest.raises(ValueError, match=r"shape of its argument, \(1, 2\).* Received: "):
        layers.StraightThrough(ops.sum)(tensor([[1.0, 2.0]]))
