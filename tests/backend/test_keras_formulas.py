"""Derivatives of operations at the points where frameworks' formulas have wrong ones, in closed form."""

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


@pytest.mark.parametrize(("fun", "base"), [(ops.logaddexp, np.e), (ops.logaddexp2, 2.0)], ids=["e", "2"])
class TestLogaddexp:
    @pytest.mark.parametrize("distance", [0.0, 0.5, -3.0, 200.0])
    def test_derivatives(self, fun, base, distance):
        x1, x2 = tensor(1.0 + distance), tensor(1.0)
        share = 1 / (1 + base**-distance)
        by_both = kg.grad(fun, argnums=(0, 1))(x1, x2)
        close(by_both, (np.asarray(share), np.asarray(1 - share)), 1e-5)
        second = kg.grad(kg.grad(fun))(x1, x2)
        close(second, np.asarray(np.log(base) * share * (1 - share)), 1e-5)

    def test_values_in_a_block_are_those_outside(self, fun, base):
        x1, x2 = tensor([-np.inf, -np.inf, np.inf, 1e4, 1.0, -1e4]), tensor([-np.inf, 2.0, 1.0, -1e4, 1.0, 1e-3])
        expected = ops.convert_to_numpy(fun(x1, x2))
        with kg.GradientTape() as tape:
            tape.watch([x1, x2])
            close(fun(x1, x2), expected, 1e-6)


def test_ldexp():
    exponents = np.array([1, 2, -1, 3], "int32")
    close(kg.grad(lambda x: ops.sum(ops.ldexp(x, exponents)))(tensor([1.0, 2.0, 3.0, 0.0])), [2, 4, 0.5, 8])


def test_nextafter_of_equal_numbers():
    close(kg.grad(lambda x: ops.sum(ops.nextafter(x, 0.0)))(tensor([0.0, 2.0])), [1, 1])
