"""Given cotangents, tangents and vectors: real numbers are taken as they are, anything else is refused in words."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from tests.cases import close, tensor

X = [1.0, 2.0]
COMPLEX = np.array([1 + 5j, 2], "complex64")


def recorded():
    x = tensor(X)
    with kg.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = x * x
    return tape, y, x


def model_and_operator():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    data = (np.ones((2, 1), "float32"), np.ones((2, 1), "float32"))
    return model, kg.curvature.Hessian(model, keras.losses.MeanSquaredError(), data)


def functional_weights(given):
    fun, weights = kg.functionalize(model_and_operator()[0])
    return fun([ops.reshape(given[:1], (1, 1)), weights[1]], np.ones((2, 1), "float32"))


def gradient_of_rule(given):
    return kg.grad(lambda x: ops.sum(kg.custom_gradient(lambda x: (x * x, lambda upstream: given))(x)))(tensor(X))


TAKES = {
    "GradientTape.gradient": lambda u: (lambda tape, y, x: tape.gradient(y, x, output_gradients=u))(*recorded()),
    "GradientTape.jvp": lambda v: (lambda tape, y, x: tape.jvp(y, x, v))(*recorded()),
    "GradientTape.linearize": lambda v: (lambda tape, y, x: tape.linearize(y, x)(v))(*recorded()),
    "vjp": lambda u: kg.vjp(lambda x: x * x, tensor(X))[1](u)[0],
    "jvp": lambda v: kg.jvp(lambda x: x * x, (tensor(X),), (v,))[1],
    "linearize": lambda v: kg.linearize(lambda x: x * x, tensor(X))[1](v),
    "hvp": lambda v: kg.hvp(lambda x: ops.sum(x**3) / 3, (tensor(X),), (v,))[0],
    "ggnvp": lambda v: kg.ggnvp(lambda x: x, lambda y: ops.sum(y**3) / 3, (tensor(X),), (v,))[0],
}
OTHERS = {
    "a nested vector of a curvature operator": lambda v: (
        model_and_operator()[1] @ [ops.reshape(tensor(v[:1], v.dtype), (1, 1)), v[1:]]
    ),
    "a flat vector of a curvature operator": lambda v: model_and_operator()[1] @ v,
    "functional weights": functional_weights,
    "grad_fn": gradient_of_rule,
    "straight_through": lambda v: kg.straight_through(lambda x: v)(tensor(X)),
}


@pytest.mark.parametrize("convert", [np.asarray, ops.convert_to_tensor], ids=["array", "tensor"])
@pytest.mark.parametrize("take", [*TAKES.values(), *OTHERS.values()], ids=[*TAKES, *OTHERS])
def test_complex_values_are_refused(take, convert):
    with pytest.raises(ValueError, match="(?s)real|multiplies a vector.*complex64"):
        take(convert(COMPLEX))


@pytest.mark.parametrize("take", TAKES.values(), ids=TAKES)
@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        (np.array([3, -4]), [3, -4]),
        (np.array([3, 250], "uint8"), [3, 250]),
        (np.array([True, False]), [1, 0]),
        (np.array([0.5, 2.0], "float64"), [0.5, 2]),
        (np.array([0.5, 2.0], "float16"), [0.5, 2]),
    ],
    ids=lambda x: str(getattr(x, "dtype", "")),
)
def test_real_numbers_are_cast(take, given, numbers):
    """Each of these maps is diag(2 x)."""
    close(take(given), np.array(numbers) * [2.0, 4.0])
    close(take(ops.convert_to_tensor(given)), np.array(numbers) * [2.0, 4.0])


def test_python_numbers_and_variables_are_taken():
    close(kg.jvp(lambda x: x * x, (3.0,), (2,))[1], 12.0)
    close(kg.jvp(lambda x: x * x, (tensor(X),), (keras.Variable([1.0, 10.0]),))[1], [2.0, 40.0])


@pytest.mark.parametrize(
    "given",
    ["1.5", 1j, object(), {1, 2}, np.array(["1", "2"]), np.array([1.0, None]), keras.KerasTensor((2,))],
    ids=["a string", "1j", "an object", "a set", "an array of strings", "an array of objects", "a KerasTensor"],
)
@pytest.mark.parametrize("take", TAKES.values(), ids=TAKES)
def test_what_is_no_real_number_is_refused(take, given):
    with pytest.raises(ValueError, match=r"(?s)must be (real|a tensor, an array or a number)\. ?.*Received: "):
        take(given)


def test_complex_values_between_real_ones_are_differentiated():
    """Parseval: the squares of a spectrum sum up to n times those of the signal."""

    def power(x):
        real, imaginary = ops.fft((x, ops.zeros_like(x)))
        return ops.sum(real**2 + imaginary**2)

    x = tensor([[1.0, 2.0, -1.0, 0.5]])
    close(kg.grad(power)(x), 8 * np.array([[1.0, 2.0, -1.0, 0.5]]), atol=1e-5)
    close(kg.hvp(power, (x,), (ops.ones_like(x),))[0], 8 * np.ones((1, 4)), atol=1e-5)
