"""The Laplacian and the divergence by one collapsed pass: closed forms, nested derivatives, and training."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from tests.transforms import point_functions
from tests.transforms.point_functions import attention, custom

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 3)).astype("float32")
MATRIX = RNG.normal(size=(3, 3)).astype("float32")


def numbers(x):
    return ops.convert_to_numpy(ops.stop_gradient(ops.convert_to_tensor(x))).astype("float64")


def close(found, expected, rtol=1e-4, atol=1e-5):
    np.testing.assert_allclose(numbers(found), numbers(expected), rtol=rtol, atol=atol)


def nested(fun, x, matrix=None):
    """The sum of D_ij d_i d_j f, by derivatives of derivatives, one at a time."""
    x = ops.convert_to_tensor(x)
    n = x.shape[1]
    matrix = np.eye(n) if matrix is None else matrix
    units = [ops.broadcast_to(ops.convert_to_tensor(e, dtype=x.dtype), x.shape) for e in np.eye(n)]

    def along(x, i, j):
        return kg.jvp(lambda x: kg.jvp(fun, (x,), (units[i],))[1], (x,), (units[j],))[1]

    def total(x):
        found = 0.0
        for i in range(n):
            for j in range(n):
                if np.any(matrix[..., i, j]):
                    second = along(x, i, j)
                    factor = ops.convert_to_tensor(np.asarray(matrix[..., i, j]), dtype=x.dtype)
                    found = found + second * ops.reshape(factor, (-1, *(1,) * (len(second.shape) - 1)))
        return found

    return kg.jit(total)(x)


network = functools.partial(point_functions.network, columns=3, width=5)


def recurrent():
    return keras.Sequential([keras.Input((3,)), layers.Reshape((3, 1)), layers.SimpleRNN(4), layers.Dense(2)])


def complex_numbers(x):
    return ops.cast(x[:, 0], "complex64") + 1j * ops.cast(x[:, 1], "complex64")


FUNCTIONS = {
    **{name: network(name) for name in ("tanh", "gelu", "silu", "softplus", "sigmoid", "elu", "mish", "relu")},
    "layer normalization": network("tanh", layers.LayerNormalization()),
    "batch normalization": network("tanh", layers.BatchNormalization()),
    "attention": attention,
    "recurrent": recurrent(),
    "convolution": keras.Sequential(
        [
            keras.Input((3,)),
            layers.Reshape((3, 1)),
            layers.Conv1D(4, 2, activation="tanh"),
            layers.Flatten(),
            layers.Dense(1),
        ]
    ),
    "columns": lambda x: x[:, 0:1] ** 3 * ops.exp(x[:, 1:2]) + ops.sin(x[:, 2])[:, None] * x[:, :1],
    "broadcasting": lambda x: ops.sum(x, axis=1, keepdims=True) * x / (1 + ops.sum(x**2, axis=1, keepdims=True)),
    "norm": lambda x: ops.sqrt(ops.sum(x**2, axis=1)),
    "concatenated": lambda x: ops.tanh(ops.concatenate([x[:, :2] * x[:, 1:], ops.ones((4, 2)), x], axis=1)),
    "transposed": lambda x: ops.transpose(ops.exp(ops.transpose(x)) * ops.reshape(x, (3, 4))),
    "maximum": lambda x: ops.maximum(x**2, ops.roll(x, 1, axis=1)) ** 2,
    "custom gradient": custom,
    "differences": lambda x: ops.sin(ops.ones((4, 3)) - x) * (ops.ones((4, 3)) - x**3),
    "a number over a tensor": lambda x: ops.divide(2.0, ops.add(2.0, ops.square(x))) - 1 / ops.cosh(x),
    "powers of a number": lambda x: ops.power(2.0, x) + ops.power(ops.exp(x), -2),
    "constant": lambda x: ops.ones((4, 2)),
    "a part that is constant": lambda x: ops.concatenate([ops.ones((4, 2)), x**2], axis=1),
    "higher rank": lambda x: ops.einsum("bi,bj->bij", x, ops.sin(x)),
    "program": kg.jit(lambda x: ops.exp(x) * ops.sin(x)),
    "modulus": lambda x: ops.abs(complex_numbers(x)),
    "complex logarithm": lambda x: ops.real(ops.log(complex_numbers(x))) * x[:, 1],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_laplacian_is_that_by_nested_derivatives(name):
    fun = FUNCTIONS[name]
    close(kg.laplacian(fun)(X), nested(fun, X))


# The derivatives of gelu and of attention are those of the test above; coefficients do not depend on the function.
@pytest.mark.parametrize(
    "name",
    [
        *[pytest.param(name, marks=pytest.mark.fast_on("torch")) for name in ("gelu", "attention")],
        *["columns", "broadcasting", "custom gradient", "higher rank"],
    ],
)
def test_coefficients(name):
    fun = FUNCTIONS[name]
    expected = nested(fun, X, MATRIX)
    close(kg.laplacian(fun, coefficients=MATRIX)(X), expected)
    close(kg.laplacian(fun, coefficients=MATRIX, chunk_size=2)(X), expected)
    each = RNG.normal(size=(4, 3, 3)).astype("float32")
    close(kg.laplacian(fun, coefficients=each)(X), nested(fun, X, each))
    diagonal = np.array([2.0, -1.0, 0.5], "float32")
    close(kg.laplacian(fun, coefficients=diagonal)(X), nested(fun, X, np.diag(diagonal)))


def test_coefficients_of_some_axes():
    fun, matrix = FUNCTIONS["tanh"], np.array([[1.0, 2.0], [3.0, -4.0]], "float32")
    full = np.zeros((3, 3))
    full[np.ix_([2, 0], [2, 0])] = matrix
    close(kg.laplacian(fun, axes=[2, 0], coefficients=matrix)(X), nested(fun, X, full))


def test_coefficients_have_a_gradient():
    """The Laplacian is linear in them: its derivative by D_ij is the second derivative."""
    point, fun = X[:1], lambda x: ops.sin(x[:, 0] * x[:, 1]) + x[:, 2] ** 3
    gradient = kg.grad(lambda d: kg.laplacian(fun, coefficients=d)(point)[0])(ops.convert_to_tensor(MATRIX))
    hessian = kg.hessian(lambda x: fun(x[None])[0])(ops.convert_to_tensor(point[0]))
    close(gradient, hessian)


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
@pytest.mark.parametrize("name", ["tanh", "attention"])
def test_chunks_change_nothing(name, chunk_size):
    close(kg.laplacian(FUNCTIONS[name], chunk_size=chunk_size)(X), kg.laplacian(FUNCTIONS[name])(X), rtol=1e-5)
    field = lambda x: FUNCTIONS["transposed"](x)  # noqa: E731
    close(kg.divergence(field, chunk_size=chunk_size)(X), kg.divergence(field)(X), rtol=1e-5)


@pytest.mark.parametrize("name", ["broadcasting", "transposed", "maximum", "custom gradient"])
def test_divergence_is_the_trace_of_the_jacobian(name):
    fun = FUNCTIONS[name]
    x = ops.convert_to_tensor(X)
    columns = [
        kg.jvp(fun, (x,), (ops.broadcast_to(ops.convert_to_tensor(e), x.shape),))[1] for e in np.eye(3, dtype="float32")
    ]
    close(kg.divergence(fun)(X)[:, 0], sum(column[:, k] for k, column in enumerate(columns)))


def test_the_laplacian_of_a_laplacian():
    """The biharmonic operator of r^4 in three dimensions is 120."""
    fourth = lambda x: ops.sum(x**2, axis=1) ** 2  # noqa: E731
    close(kg.laplacian(kg.laplacian(fourth))(X), np.full(4, 120.0), rtol=1e-4)


def test_under_jit_and_in_a_gradient():
    model = FUNCTIONS["tanh"]
    close(kg.jit(lambda x: kg.laplacian(model)(x))(X), nested(model, X))
    fun = lambda x: ops.sum(ops.sin(x), axis=1)  # noqa: E731
    gradient = kg.grad(lambda x: ops.sum(kg.laplacian(fun)(x)))(ops.convert_to_tensor(X))
    close(gradient, -np.cos(X))


@pytest.mark.parametrize(
    "name", ["tanh", *[pytest.param(n, marks=pytest.mark.fast_on("torch")) for n in ("silu", "layer normalization")]]
)
def test_the_gradient_by_the_weights_is_that_of_nested_derivatives(name):
    model = FUNCTIONS[name]

    def gradients(laplacian):
        with kg.GradientTape() as tape:
            loss = ops.sum(laplacian(ops.convert_to_tensor(X)) ** 2)
        return tape.gradient(loss, model.trainable_variables, unconnected_gradients="zero")

    for found, expected in zip(gradients(kg.laplacian(model)), gradients(lambda x: nested(model, x)), strict=True):
        close(found, expected, rtol=1e-3, atol=1e-4)


def test_new_weights_are_seen():
    model = network("tanh")
    before = numbers(kg.laplacian(model)(X))
    for v in model.trainable_variables:
        v.assign(1.5 * v)
    found = kg.laplacian(model)(X)
    assert not np.allclose(numbers(found), before)
    close(found, nested(model, X))


def test_dropout_draws_one_mask():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(8, "tanh"), layers.Dropout(0.5, seed=3), layers.Dense(1)])
    fun = lambda x: model(x, training=True)  # noqa: E731
    close(kg.laplacian(fun)(X), nested(fun, X))


def test_the_inputs_stay_as_they_are():
    x = ops.convert_to_tensor(X)
    flag = getattr(x, "requires_grad", None)
    kg.laplacian(FUNCTIONS["tanh"])(x)
    assert getattr(x, "requires_grad", None) == flag
    np.testing.assert_array_equal(numbers(x), X.astype("float64"))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: kg.laplacian(ops.sin, coefficients=np.ones(2))(X), r"shape \(3,\), \(3, 3\) or \(batch, 3, 3\)"),
        (lambda: kg.laplacian(ops.sin, coefficients=np.ones((5, 3, 3)))(X), "one matrix for each of the 4 examples"),
        (lambda: kg.laplacian(ops.sin, coefficients="isotropic")(X), "coefficients"),
        (lambda: kg.laplacian(ops.sin, chunk_size=0), "chunk_size"),
        (lambda: kg.divergence(ops.sin, chunk_size=-1), "chunk_size"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
