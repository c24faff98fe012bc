"""Every method of `tf.GradientTape` is here, with its arguments, their order and their defaults."""

import inspect

import keras
import numpy as np
import pytest

import keras_gradtools as kg
from tests.cases import close, tensor

if keras.backend.backend() != "tensorflow":
    pytest.skip("these are about TensorFlow", allow_module_level=True)

import tensorflow as tf  # noqa: E402

METHODS = ["__init__", *(name for name in vars(tf.GradientTape) if not name.startswith("_"))]


@pytest.mark.parametrize("method", METHODS)
def test_signatures(method):
    theirs = list(inspect.signature(getattr(tf.GradientTape, method)).parameters.values())
    ours = list(inspect.signature(getattr(kg.GradientTape, method)).parameters.values())
    assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
    for our, their in zip(ours, theirs, strict=False):
        default = their.default.value if isinstance(their.default, tf.UnconnectedGradients) else their.default
        assert our.default == default
    # What is more here can be left out.
    assert all(p.default is not p.empty for p in ours[len(theirs) :])


def test_what_is_compared():
    expected = {"gradient", "jacobian", "batch_jacobian", "watch", "watched_variables", "reset", "stop_recording"}
    assert expected | {"__init__"} == set(METHODS)


@pytest.mark.parametrize("choice", [tf.UnconnectedGradients.NONE, tf.UnconnectedGradients.ZERO])
@pytest.mark.parametrize("method", ["gradient", "jacobian", "batch_jacobian"])
def test_unconnected(method, choice):
    found = []
    for tape_class in (tf.GradientTape, kg.GradientTape):
        x, other = tensor(np.ones((2, 3))), tensor(np.ones((2, 4)))
        with tape_class() as tape:
            tape.watch([x, other])
            y = x * x
        found.append(getattr(tape, method)(y, other, unconnected_gradients=choice))
    if found[0] is None:
        assert found[1] is None
    else:
        close(found[1], found[0].numpy())


@pytest.mark.parametrize("method", ["jacobian", "batch_jacobian"])
@pytest.mark.parametrize("arguments", [(), (tf.UnconnectedGradients.NONE, 2), ("zero", None, False), ("none", 3, True)])
def test_positional_arguments(method, arguments):
    arguments = [tf.UnconnectedGradients(a) if isinstance(a, str) else a for a in arguments]

    # TensorFlow itself takes some of them in graphs alone.
    @tf.function
    def derivative(tape_class):
        x = tensor([[1.0, 2.0], [3.0, 4.0]])
        with tape_class(persistent=True) as tape:
            tape.watch(x)
            y = x * x * x[:, ::-1]
        return getattr(tape, method)(y, x, *arguments)

    close(derivative(kg.GradientTape), derivative(tf.GradientTape).numpy())
