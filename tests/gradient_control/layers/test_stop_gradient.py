"""`StopGradient` in a model."""

import keras
import numpy as np

from keras_gradtools import layers
from tests.cases import close, tensor


def test_what_lies_before_it_is_not_trained():
    before = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    after = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    head = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    inputs = keras.Input((1,))
    hidden = before(inputs)
    model = keras.Model(inputs, [head(hidden), after(layers.StopGradient()(hidden))])
    model.compile(keras.optimizers.SGD(0.1), ["mse", "mse"])
    model.fit(np.array([[2.0]]), [np.array([[1.0]]), np.array([[5.0]])], verbose=0)
    # The losses (2 - 1)^2 and (2 - 5)^2; only the first one reaches `before`.
    close(before.kernel, [[1 - 0.1 * 2 * 1 * 2]])
    close(head.kernel, [[1 - 0.1 * 2 * 1 * 2]])
    close(after.kernel, [[1 + 0.1 * 2 * 3 * 2]])


def test_nested_inputs_of_any_dtype():
    stopped = layers.StopGradient()({"a": tensor(1.0), "b": [tensor(2, "int32")]})
    close(stopped, {"a": 1, "b": [2]})
    symbolic = layers.StopGradient()({"a": keras.Input((2,)), "b": [keras.Input((3,), dtype="int32")]})
    assert symbolic["a"].shape == (None, 2) and symbolic["a"].dtype == "float32"
    assert symbolic["b"][0].shape == (None, 3) and symbolic["b"][0].dtype == "int32"
