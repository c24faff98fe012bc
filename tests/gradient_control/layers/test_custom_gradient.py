"""`CustomGradient` in a model."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from keras_gradtools import layers
from tests.cases import close, tensor


@keras.saving.register_keras_serializable(package="tests_custom_gradient")
def mixed(x, y):
    """The products of all pairs, whose gradients are wrong on purpose: nothing else gives 3 and 5."""
    value = ops.einsum("bi,bj->bij", x, y)
    return value, lambda upstream: (3 * ops.sum(upstream, axis=2), 5 * ops.sum(upstream, axis=1))


def model_of_two():
    inputs = [keras.Input((2,)), keras.Input((3,))]
    return keras.Model(inputs, layers.CustomGradient(mixed)(inputs))


def check(model):
    x, y = tensor([[1.0, 2.0]]), tensor([[3.0, 4.0, 5.0]])
    with kg.GradientTape() as tape:
        tape.watch([x, y])
        z = model([x, y])
    close(z, [[[3, 4, 5], [6, 8, 10]]])
    close(tape.gradient(z, [x, y]), [[[9, 9]], [[10, 10, 10]]])


def test_several_inputs(tmp_path):
    model = model_of_two()
    assert model.output_shape == (None, 2, 3)
    check(model)
    model.save(tmp_path / "model.keras")
    check(keras.models.load_model(tmp_path / "model.keras"))


def test_a_dict_of_inputs():
    layer = layers.CustomGradient(lambda p: (p["x"] * p["y"], lambda u: {"x": 7 * u, "y": 9 * u}))
    inputs = {name: keras.Input((1,), name=name) for name in ("x", "y")}
    model = keras.Model(inputs, layer(inputs))
    given = {"x": tensor([[2.0]]), "y": tensor([[5.0]])}
    with kg.GradientTape() as tape:
        tape.watch(given)
        value = model(given)
    close(value, [[10]])
    close(tape.gradient(value, given), {"x": [[7]], "y": [[9]]})


def test_in_fit():
    dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    double = layers.CustomGradient(lambda x: (2 * x, lambda upstream: 7 * upstream))
    model = keras.Sequential([keras.Input((1,)), dense, double])
    model.compile(keras.optimizers.SGD(0.01), "mse")
    model.fit(np.array([[3.0]]), np.array([[1.0]]), verbose=0)
    close(dense.kernel, [[1 - 0.01 * 7 * 2 * (6 - 1) * 3]])


def test_refuses_what_is_no_function():
    with pytest.raises(ValueError, match="custom_gradient takes a function. Received: 3"):
        layers.CustomGradient(3)


def test_refuses_a_function_without_a_gradient():
    with pytest.raises(ValueError, match="'square' with a custom gradient must return a pair: .* Received: "):
        layers.CustomGradient(ops.square)(tensor([1.0]))
