"""`ScaleGradient` in a model."""

import keras
import numpy as np
import pytest

from keras_gradtools import layers
from tests.cases import close, tensor


def test_in_fit():
    dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    model = keras.Sequential([keras.Input((1,)), dense, layers.ScaleGradient(0.5)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(np.array([[3.0]]), np.array([[1.0]]), verbose=0)
    close(dense.kernel, [[1 - 0.1 * 0.5 * 2 * 2 * 3]])


@pytest.mark.parametrize(
    "scale", [float("inf"), "1", None, True, tensor(1.0)], ids=["inf", "str", "None", "bool", "tensor"]
)
def test_refuses_scales(scale):
    with pytest.raises(ValueError, match="scale must be a finite number. Received: scale="):
        layers.ScaleGradient(scale)
