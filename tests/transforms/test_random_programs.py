"""Random programs through every transform, against central differences of the same program in NumPy, in float64."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from keras import ops

import keras_gradtools as kg
from tests.cases import tensor
from tests.test_properties import SIZE, difference, near, programs, run, vectors

# inductor takes seconds for a program, and little longer for a few together.
AT_ONCE = 20


def checked(count):
    return hypothesis.settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def check(program, x, u, v):
    def fun(x):
        return run(program, x, numpy=False)

    def total(x):
        return ops.sum(fun(x))

    def along(x, direction):
        return difference(lambda x: run(program, x, True).sum(), x, direction, 1e-3)

    point, tangent = tensor(x), tensor(v)
    expected = difference(lambda x: run(program, x, True), x, v, 1e-3)
    out, pushed = kg.jvp(fun, (point,), (tangent,))
    near(out, run(program, x, True))
    near(pushed, expected)
    near(kg.linearize(fun, point)[1](tangent), expected)
    (pulled,) = kg.vjp(fun, point)[1](tensor(u))
    near(ops.convert_to_numpy(pulled) @ v, u @ expected)
    near(ops.convert_to_numpy(kg.grad(total)(point)) @ v, along(x, v))

    curved = difference(lambda x: along(x, u), x, v, 1e-2)
    near(u @ ops.convert_to_numpy(kg.hvp(total, (point,), (tangent,))[0]), curved, 1e-4)
    near(u @ ops.convert_to_numpy(kg.linearize(kg.grad(total), point)[1](tangent)), curved, 1e-4)


def check_matrices(program, x, u, v):
    def fun(x):
        return run(program, x, numpy=False)

    columns = [difference(lambda x: run(program, x, True), x, e, 1e-3) for e in np.eye(SIZE)]
    near(kg.jacobian(fun, mode="forward", chunk_size=2)(tensor(x)), np.stack(columns, axis=-1))
    curved = difference(lambda x: difference(lambda x: run(program, x, True).sum(), x, u, 1e-3), x, v, 1e-2)
    hessian = ops.convert_to_numpy(kg.hessian(lambda x: ops.sum(fun(x)))(tensor(x)))
    near(u @ hessian @ v, curved, 1e-4)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-4 * (1 + np.abs(hessian).max()))


def to_second_order(program):
    """A function that returns the value of a program, and its first and second derivatives along directions."""

    def fun(x):
        return run(program, x, numpy=False)

    def everything(x, u, v):
        total = kg.hvp(lambda x: ops.sum(fun(x)), (x,), (v,))[0]
        return [fun(x), kg.jvp(fun, (x,), (v,))[1], kg.vjp(fun, x)[1](u)[0], total]

    return everything


def check_compiled(program, x, u, v):
    """Values, first and second derivatives of compiled functions equal those of eager ones, bit for bit."""
    everything = to_second_order(program)
    compiled = kg.jit(everything)
    for scale in (1.0, 0.5, 0.25):
        given = [tensor(scale * w) for w in (x, u, v)]
        for found, expected in zip(compiled(*given), everything(*given), strict=True):
            np.testing.assert_array_equal(ops.convert_to_numpy(found), ops.convert_to_numpy(expected))


@checked(10)
@hypothesis.given(program=programs, x=vectors, u=vectors, v=vectors)
def test_compiled(program, x, u, v, backend):
    if backend != "torch":
        pytest.skip("only on torch are the operations the same")
    check_compiled(program, x, u, v)


@pytest.mark.slow
@checked(500)
@hypothesis.given(program=programs, x=vectors, u=vectors, v=vectors)
def test_500_compiled_programs(program, x, u, v, backend):
    if backend != "torch":
        pytest.skip("only on torch are the operations the same")
    check_compiled(program, x, u, v)


@pytest.mark.slow
@checked(500 // AT_ONCE)
@hypothesis.given(st.lists(programs, min_size=AT_ONCE, max_size=AT_ONCE), vectors, vectors, vectors)
def test_500_programs_by_inductor(backend, found, x, u, v):
    if backend != "torch":
        pytest.skip("inductor is torch's compiler")

    def everything(x, u, v):
        return [result for program in found for result in to_second_order(program)(x, u, v)]

    compiled = kg.jit(everything, compiler="inductor")
    for scale in (1.0, 0.5, 0.25):
        given = [tensor(scale * w) for w in (x, u, v)]
        for a, b in zip(compiled(*given), everything(*given), strict=True):
            b = ops.convert_to_numpy(b)
            np.testing.assert_allclose(ops.convert_to_numpy(a), b, rtol=1e-6, atol=1e-6 * (1 + np.abs(b).max()))


@checked(10)
@hypothesis.given(programs, vectors, vectors, vectors)
def test_products(program, x, u, v):
    check(program, x, u, v)


@checked(5)
@hypothesis.given(programs, vectors, vectors, vectors)
def test_matrices(program, x, u, v):
    check_matrices(program, x, u, v)


@pytest.mark.slow
@checked(500)
@hypothesis.given(programs, vectors, vectors, vectors)
def test_products_of_500_programs(program, x, u, v):
    check(program, x, u, v)


@pytest.mark.slow
@checked(100)
@hypothesis.given(programs, vectors, vectors, vectors)
def test_matrices_of_100_programs(program, x, u, v):
    check_matrices(program, x, u, v)
