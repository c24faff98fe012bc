"""Derivatives of operations at the points where frameworks' formulas have wrong ones, in closed form."""

import numpy as np
import pytest
import scipy.special
from keras import ops

import keras_gradtools as kg
from tests.cases import close, derivatives, tensor

# Older versions of Keras lack some of them.
OPERATIONS = ("i0", "ldexp", "logaddexp", "logaddexp2", "nextafter", "sinc")
MISSING = {name for name in OPERATIONS if not hasattr(ops, name)}


def needs(*names):
    return pytest.mark.skipif(bool(MISSING & set(names)), reason=f"this Keras has no {' or no '.join(MISSING)}")


@pytest.mark.parametrize(
    "compiler", [pytest.param(lambda f: f, marks=pytest.mark.fast_on("torch")), kg.jit], ids=["eager", "compiled"]
)
@pytest.mark.parametrize(
    ("fun", "expected"),
    [
        pytest.param("i0", [0, 1 / 2, 0, 3 / 8], marks=needs("i0")),
        pytest.param("sinc", [0, -(np.pi**2) / 3, 0, np.pi**4 / 5], marks=needs("sinc")),
    ],
)
def test_derivatives_at_zero(fun, expected, compiler):
    found = compiler(lambda x: derivatives(getattr(ops, fun), x, len(expected)))(tensor(0.0))
    close(found, [np.asarray(e) for e in expected], 1e-4, 1e-5)


@pytest.mark.parametrize("at", [-3.0, -0.7, -0.2, 1e-3, 0.45, 0.55, 2.0])
class TestAwayFromZero:
    @needs("i0")
    def test_i0(self, at):
        i0, i1 = scipy.special.i0(at), scipy.special.i1(at)
        close(derivatives(ops.i0, tensor(at), 2), [i1, i0 - i1 / at], 2e-4)

    @needs("sinc")
    def test_sinc(self, at):
        z = np.pi * at
        close(derivatives(ops.sinc, tensor(at), 1), [np.pi * (z * np.cos(z) - np.sin(z)) / z**2], 1e-3)


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in ("i0", "sinc")])
def test_values_in_a_block_are_those_outside(name):
    fun = getattr(ops, name)
    x = tensor([-3.0, -0.3, 0.0, 0.4, 2.0])
    expected = ops.convert_to_numpy(fun(x))
    with kg.GradientTape() as tape:
        tape.watch(x)
        close(fun(x), expected, 1e-6)


@needs("i0")
def test_i0_of_integers():
    close(ops.i0(ops.convert_to_tensor([0, 1], dtype="int32")), scipy.special.i0([0, 1]), 1e-6)


@pytest.mark.parametrize(
    ("name", "base"), [("logaddexp", np.e), pytest.param("logaddexp2", 2.0, marks=needs("logaddexp2"))]
)
class TestLogaddexp:
    @pytest.mark.parametrize("distance", [0.0, 0.5, -3.0, 200.0])
    def test_derivatives(self, name, base, distance):
        fun = getattr(ops, name)
        x1, x2 = tensor(1.0 + distance), tensor(1.0)
        share = 1 / (1 + base**-distance)
        by_both = kg.grad(fun, argnums=(0, 1))(x1, x2)
        close(by_both, (np.asarray(share), np.asarray(1 - share)), 1e-5)
        second = kg.grad(kg.grad(fun))(x1, x2)
        close(second, np.asarray(np.log(base) * share * (1 - share)), 1e-5)

    def test_values_in_a_block_are_those_outside(self, name, base):
        fun = getattr(ops, name)
        x1, x2 = tensor([-np.inf, -np.inf, np.inf, 1e4, 1.0, -1e4]), tensor([-np.inf, 2.0, 1.0, -1e4, 1.0, 1e-3])
        expected = ops.convert_to_numpy(fun(x1, x2))
        with kg.GradientTape() as tape:
            tape.watch([x1, x2])
            close(fun(x1, x2), expected, 1e-6)


@needs("ldexp")
def test_ldexp():
    exponents = np.array([1, 2, -1, 3], "int32")
    close(kg.grad(lambda x: ops.sum(ops.ldexp(x, exponents)))(tensor([1.0, 2.0, 3.0, 0.0])), [2, 4, 0.5, 8])


@needs("ldexp")
def test_ldexp_where_the_power_alone_overflows():
    x, exponents = tensor([1e-30, 1e30]), np.array([130, -140], "int32")
    expected = np.ldexp(np.array([1e-30, 1e30], "float32"), exponents)
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = ops.ldexp(x, exponents)
    close(y, expected)


@needs("nextafter")
def test_nextafter_of_equal_numbers():
    close(kg.grad(lambda x: ops.sum(ops.nextafter(x, 0.0)))(tensor([0.0, 2.0])), [1, 1])
