"""Derivatives of derivatives: nested tapes, to any order and in any mixture of modes."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from tests.cases import CASES_WITH_HESSIAN, case_id, close, tensor


def test_third_derivative():
    x = tensor(0.7)
    with kg.GradientTape() as outer:
        outer.watch(x)
        with kg.GradientTape() as middle:
            middle.watch(x)
            with kg.GradientTape() as inner:
                inner.watch(x)
                y = ops.sin(x)
            first = inner.gradient(y, x)
        second = middle.gradient(first, x)
    third = outer.gradient(second, x)
    close([first, second, third], [np.cos(0.7), -np.sin(0.7), -np.cos(0.7)])


def test_a_derivative_taken_outside_the_block_is_not_recorded():
    x = tensor(0.7)
    with kg.GradientTape() as outer, kg.GradientTape() as inner:
        outer.watch(x)
        inner.watch(x)
        y = ops.sin(x)
    first = inner.gradient(y, x)
    close([first, outer.gradient(first, x)], [np.cos(0.7), None])


def test_by_a_variable():
    v = keras.Variable(2.0)
    with kg.GradientTape() as outer:
        with kg.GradientTape() as inner:
            y = v * v * v
        slope = inner.gradient(y, v)
    close(outer.gradient(slope, v), 12)


def test_mixed_partial_derivative():
    x, v = tensor(3.0), keras.Variable(2.0)
    with kg.GradientTape(persistent=True) as outer:
        outer.watch(x)
        with kg.GradientTape() as inner:
            inner.watch(x)
            y = x * x * v * v
        slope = inner.gradient(y, x)
    close(outer.gradient(slope, [x, v]), [8, 24])


@pytest.mark.parametrize("case", CASES_WITH_HESSIAN, ids=case_id)
def test_hessian(case):
    x = tensor(case.inputs[0])
    with kg.GradientTape() as outer:
        outer.watch(x)
        with kg.GradientTape() as inner:
            inner.watch(x)
            y = case.fun(x)
        jacobian = inner.jacobian(y, x)
    hessian = outer.jacobian(jacobian, x, unconnected_gradients="zero")
    close(hessian, case.hessian, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES_WITH_HESSIAN, ids=case_id)
def test_gradient_of_the_gradient_norm(case):
    """(1/2) |g|^2 has the gradient H g."""
    x = tensor(case.inputs[0])
    with kg.GradientTape() as outer:
        outer.watch(x)
        with kg.GradientTape() as inner:
            inner.watch(x)
            y = ops.sum(case.fun(x))
        gradient = inner.gradient(y, x)
        energy = ops.sum(gradient * gradient) / 2
    outputs = tuple(range(case.hessian.ndim - 2))
    expected = case.hessian.sum(outputs) @ case.jacobians[0].sum(outputs)
    close(outer.gradient(energy, x, unconnected_gradients="zero"), expected, rtol=1e-4, atol=1e-5)


def test_jvp_of_a_gradient_is_the_hessian_times_the_vector():
    case = CASES_WITH_HESSIAN[0]
    x, v = tensor(case.inputs[0]), np.array([0.3, -2.0])
    with kg.GradientTape() as outer:
        outer.watch(x)
        with kg.GradientTape() as inner:
            inner.watch(x)
            y = case.fun(x)
        gradient = inner.gradient(y, x)
    close(outer.jvp(gradient, x, tensor(v)), case.hessian @ v)


def test_gradient_of_a_jvp_is_the_hessian_times_the_vector():
    case = CASES_WITH_HESSIAN[0]
    x, v = tensor(case.inputs[0]), np.array([0.3, -2.0])
    with kg.GradientTape() as outer:
        outer.watch(x)
        with kg.GradientTape() as inner:
            inner.watch(x)
            y = case.fun(x)
        slope = inner.jvp(y, x, tensor(v))
    close(outer.gradient(slope, x), case.hessian @ v)
