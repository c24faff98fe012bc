"""`stop_gradient` and its layer: against closed forms."""

import keras
import numpy as np
import pytest

import keras_gradtools as kg
from keras_gradtools import layers, stop_gradient
from tests.cases import close, tensor
from tests.compilers import with_every_compiler
from tests.gradient_control.slopes import gradient_of


@with_every_compiler
def test_is_a_constant(compiler):
    fun = compiler.compile(lambda x: gradient_of(lambda x: x * x * stop_gradient(x), x))
    close(fun(tensor(3.0)), 18)


def test_nesting():
    x, variable, count = tensor(3.0), keras.Variable(5.0), tensor(2, "int32")
    with kg.GradientTape(persistent=True) as tape:
        tape.watch(x)
        stopped = stop_gradient({"a": [x * x, variable], "b": (count,)})
        y = stopped["a"][0] * stopped["a"][1] * x * variable
    close(stopped, {"a": [9, 5], "b": (2,)})
    close(tape.gradient(y, [x, variable]), [9 * 5 * 5, 9 * 5 * 3])
    close(tape.gradient(stopped["a"], [x, variable]), [None, None])


def test_is_a_constant_to_a_block_that_comes_later():
    x = tensor(3.0)
    before = stop_gradient(x)
    close(gradient_of(lambda x: x * before, x), 3)


def test_symbolic():
    inputs = keras.Input((2,))
    model = keras.Model(inputs, stop_gradient(inputs) * inputs)
    close(gradient_of(model, tensor([[3.0, 4.0]])), [[3, 4]])


@pytest.mark.parametrize(
    "wrong",
    [[tensor(1.0), np.ones(2)], [tensor(1.0), 1.0], "x", None, ["x", None]],
    ids=["array", "float", "str", "None", "nothing else"],
)
def test_refuses(wrong):
    with pytest.raises(ValueError, match="stop_gradient takes tensors .* Received: .* leave it out"):
        stop_gradient(wrong)


def test_what_lies_before_it_is_not_trained():
    before = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    after = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    head = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    inputs = keras.Input((1,))
    hidden = before(inputs)
    model = keras.Model(inputs, [head(hidden), after(layers.StopGradient()(hidden))])
    model.compile(keras.optimizers.SGD(0.1), ["mse", "mse"])
    model.fit(np.array([[2.0]]), [np.array([[1.0]]), np.array([[5.0]])], verbose=0)
    # The losses (2 - 1)^2 and (2 - 5)^2; only the first one reaches `before`.
    close(before.kernel, [[1 - 0.1 * 2 * 1 * 2]])
    close(head.kernel, [[1 - 0.1 * 2 * 1 * 2]])
    close(after.kernel, [[1 + 0.1 * 2 * 3 * 2]])


def test_nested_inputs_of_any_dtype():
    stopped = layers.StopGradient()({"a": tensor(1.0), "b": [tensor(2, "int32")]})
    close(stopped, {"a": 1, "b": [2]})
    symbolic = layers.StopGradient()({"a": keras.Input((2,)), "b": [keras.Input((3,), dtype="int32")]})
    assert symbolic["a"].shape == (None, 2) and symbolic["a"].dtype == "float32"
    assert symbolic["b"][0].shape == (None, 3) and symbolic["b"][0].dtype == "int32"
