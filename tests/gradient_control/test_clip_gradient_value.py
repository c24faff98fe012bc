"""`clip_gradient_value` and its layer: against closed forms, to second order."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from keras_gradtools import clip_gradient_value, layers
from tests.cases import close, tensor
from tests.gradient_control.slopes import gradient_for, gradient_of


def test_value_clips_on_both_sides():
    close(gradient_for(lambda x: clip_gradient_value(x, 2.0), [-3.0, -1.0, 0.0, 1.5, 9.0]), [-2, -1, 0, 1.5, 2])


def test_zero_gradient_stays_zero_to_second_order():
    # y = |c|^2 with c = clip(x) at 0: its gradient 2c is inside the limit, and so is the one of that.
    x = tensor([0.0, 0.0])
    with kg.GradientTape() as tape:
        tape.watch(x)
        slope = gradient_of(lambda x: ops.sum(ops.square(clip_gradient_value(x, 3.0))), x)
    close(slope, [0, 0])
    close(tape.jacobian(slope, x), 2 * np.eye(2))


@pytest.mark.parametrize("limit", [0, -1.0, np.inf, np.nan, "1", None, True, np.ones(2)], ids=str)
def test_limits(limit):
    with pytest.raises(
        ValueError, match="clip_gradient_value expects a positive number as `max_value`. .* use stop_gradient"
    ):
        clip_gradient_value(tensor(1.0), limit)
    with pytest.raises(
        ValueError, match="ClipGradientValue expects a positive number as `max_value`. .* use stop_gradient"
    ):
        layers.ClipGradientValue(limit)


def test_in_fit():
    dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    model = keras.Sequential([keras.Input((1,)), dense, layers.ClipGradientValue(3.5)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(np.array([[3.0], [4.0]]), np.array([[0.0], [0.0]]), batch_size=2, verbose=0)
    # The gradient of the loss (9 w^2 + 16 w^2) / 2 by the two outputs is [3, 4].
    close(dense.kernel, [[1 - 0.1 * (3 * 3 + 3.5 * 4)]])


def test_refuses_integers():
    with pytest.raises(
        ValueError, match="argument of clip_gradient_value must be real and floating-point. Received: .*int32"
    ):
        layers.ClipGradientValue(1.0)(tensor([1, 2], "int32"))
