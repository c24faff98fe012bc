"""`scale_gradient` and its layer: against closed forms."""

import keras
import numpy as np
import pytest

import keras_gradtools as kg
from keras_gradtools import layers, scale_gradient
from tests.cases import close, tensor
from tests.gradient_control.slopes import gradient_for, gradient_of


@pytest.mark.parametrize(
    "scale",
    [0.5, np.float32(0.5), np.float64(0.5), tensor(0.5), tensor(0.5, "float16"), keras.Variable(0.5)],
    ids=["float", "float32", "float64", "tensor", "half_tensor", "variable"],
)
def test_kinds(scale):
    close(gradient_of(lambda x: scale_gradient(x * x, scale), tensor(3.0)), 3)


def test_integers():
    close(gradient_of(lambda x: scale_gradient(x, 2), tensor(3.0)), 2)
    close(gradient_of(lambda x: scale_gradient(x, tensor(2, "int32")), tensor(3.0)), 2)


def test_the_scale_has_no_gradient():
    for scale in (tensor(0.5), keras.Variable(0.5)):
        x = tensor(3.0)
        with kg.GradientTape(persistent=True) as tape:
            tape.watch([x, scale])
            y = scale_gradient(x, scale)
        close(tape.gradient(y, scale), None)
        close(tape.gradient(y, x), 0.5)


@pytest.mark.float64
def test_double_precision():
    close(gradient_for(lambda x: scale_gradient(x, 0.1), [3.0], "float64"), [0.3], rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    "scale",
    [np.inf, np.nan, "1", None, True, np.ones(()), tensor([1.0]), tensor(True, "bool"), tensor(1, "complex64")],
    ids=["inf", "nan", "str", "None", "bool", "array", "vector", "bool_tensor", "complex"],
)
def test_scales(scale):
    with pytest.raises(ValueError, match="scale_gradient expects a finite number, or .* as `scale`. Received: "):
        scale_gradient(tensor(1.0), scale)


def test_in_fit():
    dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    model = keras.Sequential([keras.Input((1,)), dense, layers.ScaleGradient(0.5)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(np.array([[3.0]]), np.array([[1.0]]), verbose=0)
    close(dense.kernel, [[1 - 0.1 * 0.5 * 2 * 2 * 3]])


@pytest.mark.parametrize(
    "scale", [float("inf"), "1", None, True, tensor(1.0)], ids=["inf", "str", "None", "bool", "tensor"]
)
def test_scales_of_the_layer(scale):
    with pytest.raises(ValueError, match="ScaleGradient expects a finite number as `scale`. Received: scale="):
        layers.ScaleGradient(scale)
