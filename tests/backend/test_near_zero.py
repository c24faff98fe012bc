"""Derivatives of functions that frameworks compute by formulas without derivatives at 0, in closed form."""

import numpy as np
import pytest
import scipy.special
from keras import ops

import keras_gradtools as kg
from tests.cases import close, tensor


def derivatives(fun, x, orders):
    found = []
    for _ in range(orders):
        fun = kg.grad(fun)
        found.append(fun(x))
    return found


@pytest.mark.parametrize("compiler", [lambda f: f, kg.jit], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("fun", "expected"),
    [(ops.i0, [0, 1 / 2, 0, 3 / 8]), (ops.sinc, [0, -(np.pi**2) / 3, 0, np.pi**4 / 5])],
    ids=["i0", "sinc"],
)
def test_derivatives_at_zero(fun, expected, compiler):
    found = compiler(lambda x: derivatives(fun, x, len(expected)))(tensor(0.0))
    close(found, [np.asarray(e) for e in expected], 1e-4, 1e-5)


@pytest.mark.parametrize("at", [-3.0, -0.7, -0.2, 1e-3, 0.45, 0.55, 2.0])
class TestAwayFromZero:
    def test_i0(self, at):
        i0, i1 = scipy.special.i0(at), scipy.special.i1(at)
        close(derivatives(ops.i0, tensor(at), 2), [i1, i0 - i1 / at], 2e-4)

    def test_sinc(self, at):
        z = np.pi * at
        close(derivatives(ops.sinc, tensor(at), 1), [np.pi * (z * np.cos(z) - np.sin(z)) / z**2], 1e-3)


@pytest.mark.parametrize("fun", [ops.i0, ops.sinc], ids=["i0", "sinc"])
def test_values_in_a_block_are_those_outside(fun):
    x = tensor([-3.0, -0.3, 0.0, 0.4, 2.0])
    expected = ops.convert_to_numpy(fun(x))
    with kg.GradientTape() as tape:
        tape.watch(x)
        close(fun(x), expected, 1e-6)
    close(ops.i0(ops.convert_to_tensor([0, 1], dtype="int32")), scipy.special.i0([0, 1]), 1e-6)
