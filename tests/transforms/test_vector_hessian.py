"""hessian of functions that are no scalars: shape output + input + input, as jax.hessian has it."""

import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from tests.cases import close, tensor
from tests.compilers import with_every_compiler

RANDOM = np.random.default_rng(0)
A, B = RANDOM.normal(size=(2, 3)), RANDOM.normal(size=(2, 4))
X, Y = RANDOM.normal(size=3), RANDOM.normal(size=4)
CHUNKS = pytest.mark.parametrize("chunk_size", [None, 2])


def waves(x):
    return ops.sin(ops.matmul(tensor(A), x))


# By x_j and x_k: -sin((A x)_i) A_ij A_ik.
OF_WAVES = -np.einsum("i,ij,ik->ijk", np.sin(A @ X), A, A)


@CHUNKS
def test_a_vector(chunk_size):
    close(kg.hessian(waves, chunk_size=chunk_size)(tensor(X)), OF_WAVES)


@CHUNKS
def test_a_matrix_by_a_scalar(chunk_size):
    found = kg.hessian(lambda s: tensor(A) * s**3, chunk_size=chunk_size)(2.0)
    close(found, 12.0 * A)


@CHUNKS
def test_several_arguments(chunk_size):
    def fun(x, y):
        return ops.matmul(tensor(A), x) ** 2 * ops.matmul(tensor(B), y)

    found = kg.hessian(fun, argnums=(0, 1), chunk_size=chunk_size)(tensor(X), tensor(Y))
    ax, by = A @ X, B @ Y
    mixed = np.einsum("i,ij,ik->ijk", 2 * ax, A, B)
    expected = (
        (np.einsum("i,ij,ik->ijk", 2 * by, A, A), mixed),
        (np.swapaxes(mixed, 1, 2), np.zeros((2, 4, 4))),
    )
    close(found, expected)
    close(kg.hessian(fun, argnums=1, chunk_size=chunk_size)(tensor(X), tensor(Y)), np.zeros((2, 4, 4)))


@CHUNKS
def test_nestings(chunk_size):
    def fun(p):
        return {"product": p["a"] ** 2 * p["b"], "scalar": [ops.sum(p["a"] ** 3), p["b"] * 1.0]}

    a, b = np.array([1.0, 2.0]), 3.0
    found = kg.hessian(fun, chunk_size=chunk_size)({"a": tensor(a), "b": b})
    eye = np.eye(2)
    product = {
        "a": {"a": np.einsum("ij,ik->ijk", eye, eye) * 2 * b, "b": np.diag(2 * a)},
        "b": {"a": np.diag(2 * a), "b": np.zeros(2)},
    }
    cubes = {"a": {"a": np.diag(6 * a), "b": np.zeros(2)}, "b": {"a": np.zeros(2), "b": 0.0}}
    zeros = {"a": {"a": np.zeros((2, 2)), "b": np.zeros(2)}, "b": {"a": np.zeros(2), "b": 0.0}}
    close(found, {"product": product, "scalar": [cubes, zeros]})


def test_a_scalar_in_a_container():
    close(kg.hessian(lambda x: [ops.sum(x**3)])(tensor(X)), [np.diag(6 * X)])


def test_each_output_has_the_hessian_that_it_has_alone():
    whole = ops.convert_to_numpy(kg.hessian(waves)(tensor(X)))
    for i in range(2):
        close(kg.hessian(lambda x: waves(x)[i])(tensor(X)), whole[i])  # noqa: B023
    np.testing.assert_allclose(whole, np.swapaxes(whole, 1, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.float64
def test_central_differences():
    def fun(x):
        return ops.stack([ops.sum(ops.exp(x) * x), ops.logsumexp(x), x[0] * x[1] ** 2])

    def slopes(x):
        return ops.convert_to_numpy(kg.jacobian(fun)(tensor(x, "float64")))

    h = 1e-5
    expected = np.stack([(slopes(X + h * e) - slopes(X - h * e)) / (2 * h) for e in np.eye(3)], axis=-1)
    close(kg.hessian(fun)(tensor(X, "float64")), expected, rtol=1e-7, atol=1e-8)


@CHUNKS
def test_empty_axes(chunk_size):
    assert tuple(kg.hessian(lambda x: x[:0], chunk_size=chunk_size)(tensor(X)).shape) == (0, 3, 3)
    assert tuple(kg.hessian(lambda x: x * 2, chunk_size=chunk_size)(tensor(np.zeros(0))).shape) == (0, 0, 0)


@with_every_compiler
@CHUNKS
def test_compiled_by_others(compiler, chunk_size):
    close(compiler.compile(kg.hessian(waves, chunk_size=chunk_size))(tensor(X)), OF_WAVES)


def test_a_third_derivative():
    third = kg.jacobian(kg.hessian(waves))(tensor(X))
    close(third, -np.einsum("i,ij,ik,il->ijkl", np.cos(A @ X), A, A, A))
    close(kg.grad(lambda x: ops.sum(kg.hessian(waves)(x)))(tensor(X)), ops.convert_to_numpy(ops.sum(third, (0, 1, 2))))


def test_flatten_hessian_takes_that_of_a_scalar():
    with pytest.raises(ValueError, match=r"flatten_hessian takes .* for a scalar.*\(2, 3, 3\)"):
        kg.flatten_hessian(kg.hessian(waves)(tensor(X)))
