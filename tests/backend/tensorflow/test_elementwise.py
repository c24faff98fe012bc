"""Derivatives of elementwise functions at the points where TensorFlow's own are wrong, in closed form."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from tests.cases import close, derivatives, tensor

if keras.config.backend() != "tensorflow":
    pytest.skip("functions of TensorFlow", allow_module_level=True)

import tensorflow as tf

COMPILERS = [lambda f: f, kg.jit, lambda f: tf.function(f, jit_compile=True)]


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize(
    ("fun", "expected"),
    [
        (lambda x: ops.celu(x, alpha=2.0), [1, 1 / 2, 1 / 4]),
        (lambda x: x**1.0, [1, 0, 0]),
        (lambda x: x**2, [0, 2, 0, 0]),
        (lambda x: ops.power(x, 3.0), [0, 0, 6, 0]),
        (lambda x: ops.sum(ops.power(x, tensor([0.0, 2.0]))), [0, 2, 0]),
        (ops.softsign, [1, 0]),
    ],
    ids=["celu", "first power", "square", "cube", "powers", "softsign"],
)
def test_derivatives_at_zero(fun, expected, compiler):
    found = compiler(lambda x: derivatives(fun, x, len(expected)))(tensor(0.0))
    close(found, [np.asarray(e) for e in expected], 1e-4, 1e-5)


def test_power_by_its_exponent_and_of_broadcast_arguments():
    x, y = tensor([[1.0], [2.0]]), tensor([0.0, 1.0, 3.0])
    by_x, by_y = kg.grad(lambda x, y: ops.sum(ops.power(x, y)), argnums=(0, 1))(x, y)
    close(by_x, [[4.0], [13.0]])
    close(by_y, np.log(2) * np.array([1.0, 2.0, 8.0]))


def test_second_derivative_of_softsign():
    x = np.array([-1.0, 0.5])
    close(kg.grad(lambda x: ops.sum(kg.grad(lambda x: ops.sum(ops.softsign(x)))(x)))(tensor(x)), [0.25, -16 / 27])


@pytest.mark.parametrize("compiler", COMPILERS)
def test_hsv_to_rgb(compiler):
    """Between red and yellow: (v, v (1 - s + 6 h s), v (1 - s))."""
    h, s, v = 0.1, 0.5, 0.8
    jacobian = [[0, 0, 1], [6 * s * v, v * (6 * h - 1), 1 - s + 6 * h * s], [0, -v, 1 - s]]
    x = tensor([[[h, s, v]]])
    close(ops.reshape(compiler(kg.jacobian(ops.image.hsv_to_rgb))(x), (3, 3)), jacobian, 1e-4)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_rgb_to_hsv(compiler):
    """For r > b > g: h = 1 + (g - b) / 6 (r - g), s = (r - g) / r, v = r, also where g is negative."""
    r, g, b = 0.4, -0.1, 0.3
    length = r - g
    jacobian = [
        [-(g - b) / (6 * length**2), (length + g - b) / (6 * length**2), -1 / (6 * length)],
        [g / r**2, -1 / r, 0],
        [1, 0, 0],
    ]
    x = tensor([[[r, g, b]]])
    close(ops.reshape(compiler(kg.jacobian(ops.image.rgb_to_hsv))(x), (3, 3)), jacobian, 1e-4)
    # d^2 s / dr dg = 1 / r^2, and d^2 s / dr^2 = -2 g / r^3.
    saturation = compiler(kg.hessian(lambda x: ops.image.rgb_to_hsv(x)[0, 0, 1]))(x)
    close(ops.reshape(saturation, (3, 3)), [[-2 * g / r**3, 1 / r**2, 0], [1 / r**2, 0, 0], [0, 0, 0]], 1e-3)


@pytest.mark.parametrize("color", [(0.5, 0.5, 0.5), (0.0, 0.0, 0.0), (-0.5, -0.2, -0.1)])
def test_rgb_to_hsv_of_gray_and_black_has_finite_gradients(color):
    gradient = kg.grad(lambda x: ops.sum(ops.image.rgb_to_hsv(x)))(tensor([[color]]))
    assert np.all(np.isfinite(ops.convert_to_numpy(gradient)))


def test_values_are_those_of_keras():
    x = tensor(np.random.default_rng(0).uniform(size=(2, 2, 3)))
    for fun in (ops.celu, ops.image.hsv_to_rgb, ops.image.rgb_to_hsv):
        expected = ops.convert_to_numpy(fun(x))
        with kg.GradientTape():
            close(fun(x), expected)
