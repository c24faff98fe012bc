"""What a tape does with None and integers among its sources and targets."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from tests.cases import close, tensor

X = np.array([[1.0, 2.0], [3.0, 4.0]])

CONSTANTS = {
    "none": lambda: None,
    "integer": lambda: tensor([1, 2], "int32"),
    "boolean": lambda: tensor([True, False], "bool"),
    "integer variable": lambda: keras.Variable([1, 2], dtype="int32", trainable=False),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_beside_sources_and_targets(name):
    constant, v = CONSTANTS[name](), keras.Variable(2.0, trainable=False)
    sources = {"x": tensor(X), "v": v, "other": constant}
    with kg.GradientTape(persistent=True) as tape:
        tape.watch(sources)
        y = (sources["x"] ** 2 * v, constant)
    assert tape.watched_variables() == [v] or tuple(tape.watched_variables()) == (v,)
    close(tape.gradient(y, sources), {"x": 4 * X, "v": (X**2).sum(), "other": None})
    close(tape.gradient(y, sources, (tensor(X), None)), {"x": 4 * X**2, "v": (X**3).sum(), "other": None})
    zero = tape.gradient(y, sources, unconnected_gradients="zero")
    close(zero, {"x": 4 * X, "v": (X**2).sum(), "other": None})
    close(tape.jvp(y, sources, {"x": tensor(X), "v": None, "other": None}), (4 * X**2, None))
    close(tape.linearize(y, sources)({"x": None, "v": 1.0, "other": None}), (X**2, None))
    block = 4 * np.einsum("ab,ac,bd->abcd", X, np.eye(2), np.eye(2))
    close(tape.jacobian(y[0], sources), {"x": block, "v": X**2, "other": None})


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_beside_the_sources_of_a_batch_jacobian(name):
    constant, x = CONSTANTS[name](), tensor(X)
    with kg.GradientTape() as tape:
        tape.watch([x, constant])
        y = x**2
    close(tape.batch_jacobian(y, [x, constant]), [np.stack([np.diag(2 * row) for row in X]), None])


def test_a_tangent_of_an_integer():
    x, n = tensor(X), tensor(3, "int32")
    with kg.GradientTape() as tape:
        tape.watch([x, n])
        y = x * ops.cast(n, "float32")
    with pytest.raises(ValueError, match="Each entry of tangents must be None where its counterpart in `sources` has "):
        tape.jvp(y, [x, n], [x, 1])
