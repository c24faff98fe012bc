"""A NumPy function called on a recorded tensor is a constant for every derivative, and causes a warning."""

import re
import threading
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from keras_gradtools.keras_state import numpy_calls

X = np.array([0.5, 1.0], "float32")


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(numpy_calls, "_warned_of", set())


def refuses_numpy(x):
    """Whether the framework itself raises an error for a NumPy function of a recorded tensor, as torch does."""
    with kg.GradientTape() as tape:
        tape.watch(x)
        try:
            np.asarray(x)
        except RuntimeError:
            return True
    return False


def tensor():
    x = ops.convert_to_tensor(X)
    if refuses_numpy(x):
        pytest.skip("torch itself raises an error")
    return x


@pytest.mark.parametrize(
    ("name", "fun"),
    [
        ("sin", lambda x: ops.sum(np.sin(x) * x)),
        ("exp", lambda x: np.exp(x)[0] * ops.sum(x)),
        ("multiply", lambda x: ops.sum(np.multiply(x, x))),
        ("dot", lambda x: np.dot(x, x) * ops.sum(x)),
        ("norm", lambda x: np.linalg.norm(x) * ops.sum(x)),
        ("concatenate", lambda x: ops.sum(np.concatenate([np.ones(1, "float32"), x])) * ops.sum(x)),
    ],
)
@pytest.mark.parametrize(
    "transform",
    [kg.grad, kg.value_and_grad, lambda f: lambda x: kg.jvp(f, (x,), (x,)), lambda f: lambda x: kg.vjp(f, x)],
)
def test_transforms_warn(name, fun, transform):
    with pytest.warns(UserWarning, match=rf"`numpy.{name}` was called on a tensor that is being differentiated"):
        transform(fun)(tensor())


@pytest.mark.parametrize(("fun", "right"), [(np.std, [-0.5, 0.5]), (np.mean, [0.5, 0.5]), (np.sum, [1, 1])])
def test_a_function_that_is_a_method_of_the_tensor(fun, right):
    # NumPy calls `x.std()` if there is such a method, as on JAX, and that one can be differentiated.
    x = tensor()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gradient = kg.grad(lambda x: ops.sum(x) * 0 + fun(x))(x)
    messages = [str(warning.message) for warning in caught if "is being differentiated" in str(warning.message)]
    warned = bool(messages)
    # The functions that NumPy calls in it are not named.
    assert all(f"`numpy.{fun.__name__}`" in message for message in messages)
    np.testing.assert_allclose(gradient, [0, 0] if warned else right, rtol=1e-6)


def test_message_names_the_function_of_keras():
    x = tensor()
    with pytest.warns(UserWarning, match=r"Use `keras.ops.sin` instead"):
        kg.grad(lambda x: ops.sum(np.sin(x) * x))(x)
    with pytest.warns(UserWarning, match=r"Use a function of `keras.ops` instead"):
        kg.grad(lambda x: ops.sum(np.spacing(x) * x))(x)


def test_tape_warns():
    x = tensor()
    with pytest.warns(UserWarning, match=r"`numpy.sin`"), kg.GradientTape() as tape:
        tape.watch(x)
        y = ops.sum(np.sin(x) * x)
    np.testing.assert_allclose(tape.gradient(y, x), np.sin(X), rtol=1e-6)


def test_warns_once_for_each_function():
    x = tensor()
    with pytest.warns(UserWarning) as caught:
        for _ in range(3):
            kg.grad(lambda x: ops.sum(np.sin(x) * x))(x)
            kg.grad(lambda x: ops.sum(np.cos(x) * x))(x)
    assert len(caught) == 2
    assert caught[0].filename == __file__


def test_variable():
    w = keras.Variable(X)
    with pytest.warns(UserWarning, match=r"`numpy.sin`"), kg.GradientTape():
        value = np.sin(w)
    np.testing.assert_allclose(value, np.sin(X), rtol=1e-6)


@pytest.mark.parametrize(
    "fun",
    [
        pytest.param(lambda x: ops.sum(np.ones(2, "float32") * x), id="product with an array"),
        pytest.param(lambda x: np.float32(1) * ops.sum(x), id="product with a number of NumPy"),
        pytest.param(lambda x: ops.sum(np.zeros(2, "float32") + x), id="sum"),
        pytest.param(lambda x: -ops.sum(np.zeros(2, "float32") - x), id="difference"),
        pytest.param(lambda x: ops.sum(x * np.sin(np.full(2, np.pi / 2, "float32"))), id="function of an array"),
        pytest.param(lambda x: ops.sum(x) * np.shape(x)[0] / np.ndim(x) / 2, id="shape"),
        pytest.param(lambda x: ops.sum(x) * (1 if np.isfinite(x).all() else 2), id="truth values"),
        pytest.param(lambda x: ops.sum(x) * float(np.allclose(x, X)), id="allclose"),
        pytest.param(lambda x: ops.sum(x) * ops.convert_to_numpy(x)[1], id="explicit constant"),
        pytest.param(lambda x: ops.sum(ops.where(np.zeros(2, "float32") < x, x, 0.0)), id="comparison"),
    ],
)
def test_right_without_a_warning(fun):
    x = tensor()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        np.testing.assert_allclose(kg.grad(fun)(x), [1, 1], rtol=1e-6)


def test_constants_cause_no_warning():
    x, other = tensor(), ops.convert_to_tensor(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        np.testing.assert_allclose(kg.grad(lambda x: ops.sum(np.sin(other) * x))(x), np.sin(X), rtol=1e-6)
        np.sin(x)


@pytest.mark.parametrize(
    "fun",
    [np.sin, np.sum, np.mean, np.round, np.shape, np.add.reduce, lambda x: np.array([1, 2]) * x],
    ids=["sin", "sum", "mean", "round", "shape", "reduce", "product"],
)
def test_results_are_those_without_a_tape(fun):
    x = ops.convert_to_tensor(X)
    try:
        outside = fun(x)
    except TypeError as error:
        with kg.GradientTape(), pytest.raises(TypeError, match=re.escape(str(error))):
            fun(x)
        return
    with kg.GradientTape():
        inside = fun(x)
    assert type(inside) is type(outside)
    np.testing.assert_array_equal(ops.convert_to_numpy(inside), ops.convert_to_numpy(outside))


def test_numpy_sees_it_only_while_this_thread_records():
    classes, seen = [type(ops.convert_to_tensor(X)), type(keras.Variable(X))], []

    def look():
        seen.append([hasattr(cls, "__array_ufunc__") or hasattr(cls, "__array_function__") for cls in classes])

    look()
    with kg.GradientTape():
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        assert hasattr(keras.Variable, "__array_ufunc__")
    look()
    assert seen == [[False, False]] * 3
