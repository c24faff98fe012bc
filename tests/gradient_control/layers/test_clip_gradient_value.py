"""`ClipGradientValue` in a model."""

import keras
import numpy as np
import pytest

from keras_gradtools import layers
from tests.cases import close, tensor


def test_in_fit():
    dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    model = keras.Sequential([keras.Input((1,)), dense, layers.ClipGradientValue(3.5)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(np.array([[3.0], [4.0]]), np.array([[0.0], [0.0]]), batch_size=2, verbose=0)
    # The gradient of the loss (9 w^2 + 16 w^2) / 2 by the two outputs is [3, 4].
    close(dense.kernel, [[1 - 0.1 * (3 * 3 + 3.5 * 4)]])


@pytest.mark.parametrize("limit", [0, -1.0, float("nan"), "1", None])
def test_refuses_limits(limit):
    with pytest.raises(ValueError, match="max_value must be a positive finite number. Received: max_value="):
        layers.ClipGradientValue(limit)


def test_refuses_integers():
    with pytest.raises(
        ValueError, match="argument of clip_gradient_value must be real and floating-point. Received: .*int32"
    ):
        layers.ClipGradientValue(1.0)(tensor([1, 2], "int32"))
