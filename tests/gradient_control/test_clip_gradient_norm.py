"""`clip_gradient_norm` and its layer: against closed forms, to second order."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from keras_gradtools import clip_gradient_norm, layers
from tests.cases import close, tensor
from tests.gradient_control.slopes import first_and_second, gradient_for, gradient_of


def test_the_example_of_the_guide():
    close(first_and_second(lambda v: clip_gradient_norm(v * v, 0.5))(tensor(2.0)), (4, 2, 1))
    close(gradient_of(lambda v: v * v, tensor(2.0)), 4)


def test_norm_is_that_of_the_whole_tensor():
    upstream = np.array([[3.0, 0.0], [0.0, 4.0]])
    close(gradient_for(lambda x: clip_gradient_norm(x, 1.0), upstream), upstream / 5)
    close(gradient_for(lambda x: clip_gradient_norm(x, 5.5), upstream), upstream)


def test_norm_to_second_order():
    # The gradient of y = sum(clip(x)^2) is 2x / ||2x|| where it is longer than 1: its Jacobian projects.
    x = np.array([3.0, 4.0])
    with kg.GradientTape() as outer:
        watched = tensor(x)
        outer.watch(watched)
        with kg.GradientTape() as inner:
            inner.watch(watched)
            y = ops.sum(ops.square(watched))
            clipped = clip_gradient_norm(y, 0.25)
        slope = inner.gradient(clipped, watched)
    close(slope, x / 2)
    close(outer.jacobian(slope, watched), np.eye(2) / 2)

    def normalized(u):
        point = tensor([0.0, 0.0])
        with kg.GradientTape() as tape:
            tape.watch(point)
            y = clip_gradient_norm(point, 1.0)
        return tape.gradient(y, point, output_gradients=u)

    u = tensor(x)
    with kg.GradientTape() as tape:
        tape.watch(u)
        g = normalized(u)
    close(tape.jacobian(g, u), (np.eye(2) - np.outer(x, x) / 25) / 5)


def test_zero_gradient_stays_zero_to_second_order():
    # y = |c|^2 with c = clip(x) at 0: its gradient 2c is inside the limit, and so is the one of that.
    x = tensor([0.0, 0.0])
    with kg.GradientTape() as tape:
        tape.watch(x)
        slope = gradient_of(lambda x: ops.sum(ops.square(clip_gradient_norm(x, 3.0))), x)
    close(slope, [0, 0])
    close(tape.jacobian(slope, x), 2 * np.eye(2))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_norm_of_half_precision(dtype):
    # The squares, 90000 each, overflow in float16.
    gradient = gradient_for(lambda x: clip_gradient_norm(x, 1.0), np.full(4, 300.0), dtype)
    assert keras.backend.standardize_dtype(gradient.dtype) == dtype
    close(ops.cast(gradient, "float32"), np.full(4, 0.5), rtol=0, atol=0)


def test_norm_does_not_overflow():
    close(gradient_for(lambda x: clip_gradient_norm(x, 1.0), [3e30, -4e30]), [0.6, -0.8])
    close(gradient_for(lambda x: clip_gradient_norm(x, 1e-30), [3e-25, 4e-25]), [6e-31, 8e-31], atol=0)


@pytest.mark.float64
def test_double_precision():
    gradient = gradient_for(lambda x: clip_gradient_norm(x, 0.1), [3.0, 4.0], "float64")
    close(gradient, [0.06, 0.08], rtol=1e-15, atol=0)


@pytest.mark.parametrize("limit", [0, -1.0, np.inf, np.nan, "1", None, True, np.ones(2)], ids=str)
def test_limits(limit):
    with pytest.raises(
        ValueError, match="clip_gradient_norm expects a positive number as `max_norm`. .* use stop_gradient"
    ):
        clip_gradient_norm(tensor(1.0), limit)
    with pytest.raises(
        ValueError, match="ClipGradientNorm expects a positive number as `max_norm`. .* use stop_gradient"
    ):
        layers.ClipGradientNorm(limit)


def test_in_fit():
    dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    model = keras.Sequential([keras.Input((1,)), dense, layers.ClipGradientNorm(2.5)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(np.array([[3.0], [4.0]]), np.array([[0.0], [0.0]]), batch_size=2, verbose=0)
    # The gradient of the loss (9 w^2 + 16 w^2) / 2 by the two outputs is [3, 4].
    close(dense.kernel, [[1 - 0.1 * (1.5 * 3 + 2 * 4)]])


def test_refuses_integers():
    with pytest.raises(
        ValueError, match="argument of clip_gradient_norm must be real and floating-point. Received: .*int32"
    ):
        layers.ClipGradientNorm(1.0)(tensor([1, 2], "int32"))
