"""`straight_through` and its layer: against closed forms, to second order."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_gradtools import layers, straight_through
from tests.cases import close, tensor
from tests.gradient_control.slopes import first_and_second, gradient_of


def test_a_step():
    step = straight_through(lambda x: x > 0)
    x = tensor([-1.0, 2.0])
    close(step(x), [0, 1])
    close(gradient_of(lambda x: step(x) * tensor([3.0, 5.0]), x), [3, 5])


def test_the_gradient_is_taken_at_the_value():
    close(first_and_second(lambda x: ops.square(straight_through(ops.round)(x)))(tensor(2.7)), (9, 6, 2))


def test_keeps_the_name():
    def quantize(x):
        """Rounds."""
        return ops.round(x)

    assert straight_through(quantize).__name__ == "quantize"


def test_refuses_a_change_of_shape():
    with pytest.raises(ValueError, match=r"'sum' .*shape of its argument, \(3,\).* Received: .*shape \(\)"):
        straight_through(ops.sum)(tensor([1.0, 2.0, 3.0]))


def test_refuses_what_is_no_function():
    with pytest.raises(ValueError, match="straight_through takes a function. Received: .*'round'"):
        straight_through("round")


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


@pytest.mark.parametrize(("fun", "values"), [(step, [1, 0]), (keras.activations.relu, [2.7, 0]), (ops.round, [3, -1])])
def test_is_saved_with_its_function(fun, values, tmp_path):
    inputs = keras.Input((2,))
    model = keras.Model(inputs, layers.StraightThrough(fun)(inputs))
    model.save(tmp_path / "model.keras")
    close(keras.models.load_model(tmp_path / "model.keras")(tensor([[2.7, -1.0]])), [values])


def test_the_layer_refuses_what_is_no_function():
    with pytest.raises(ValueError, match="straight_through takes a function. Received: 'relu'"):
        layers.StraightThrough("relu")


def test_the_layer_refuses_a_change_of_shape():
    with pytest.raises(ValueError, match=r"shape of its argument, \(1, 2\).* Received: "):
        layers.StraightThrough(ops.sum)(tensor([[1.0, 2.0]]))
