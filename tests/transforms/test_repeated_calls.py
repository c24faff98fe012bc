"""The short way of a call that repeats the last one: it is taken, and whatever differs from the last call is seen."""

import collections

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.keras_state.layer_state import get_keras_mask, set_keras_mask
from keras_gradtools.keras_state.scopes import StateScope
from keras_gradtools.transforms import compiled
from tests.cases import close, tensor

X = tensor([[1.0, 2.0], [3.0, -1.0]])


def repeated(compute, *args, **kwargs):
    """The result of a fourth call, which is a repeated one."""
    for _ in range(3):
        compute(*args, **kwargs)
    return compute(*args, **kwargs)


@pytest.fixture
def searches(monkeypatch):
    """What was called on the long way."""
    calls = []
    prepare = compiled.prepare
    monkeypatch.setattr(compiled, "prepare", lambda name, *rest: calls.append(name) or prepare(name, *rest))
    return calls


def model_of(units=3):
    return keras.Sequential([keras.Input((2,)), layers.Dense(units, "tanh"), layers.Dense(2)])


@pytest.mark.parametrize(
    "transform, args",
    [
        (kg.jacobian(lambda x: x**2), (tensor([1.0, 2.0]),)),
        (kg.hessian(lambda x: ops.sum(x**3)), (tensor([1.0, 2.0]),)),
        (kg.batch_jacobian(model_of()), (X,)),
        (kg.jacobian(lambda x, c, flag: c * x if flag else x, argnums=0), (X, tensor(2.0), True)),
    ],
)
def test_it_is_taken(transform, args, searches):
    repeated(transform, *args)
    first = len(searches)
    close(transform(*args), ops.convert_to_numpy(transform(*args)))
    assert first == 3 and len(searches) == first


def test_other_weights():
    model = model_of()
    jacobian = kg.batch_jacobian(model)
    before = ops.convert_to_numpy(repeated(jacobian, X))
    model.layers[-1].kernel.assign(2 * model.layers[-1].kernel.value)
    close(jacobian(X), 2 * before)
    model.set_weights([np.zeros(w.shape) for w in model.get_weights()])
    close(jacobian(X), 0 * before)


def test_other_values_shapes_and_dtypes():
    jacobian = kg.jacobian(lambda x: x**2)
    repeated(jacobian, tensor([1.0, 2.0]))
    close(jacobian(tensor([3.0, 4.0])), np.diag([6.0, 8.0]))
    close(jacobian(tensor([3.0])), [[6.0]])
    close(jacobian(tensor([[3.0]])), [[[[6.0]]]])
    assert keras.backend.standardize_dtype(jacobian(tensor([3.0], "float16")).dtype) == "float16"
    close(jacobian(np.array([5.0], "float32")), [[10.0]])
    close(jacobian(keras.Variable([7.0])), [[14.0]])
    close(jacobian(4.0), 8.0)


def test_a_variable_of_another_value():
    x = keras.Variable([1.0])
    jacobian = kg.jacobian(lambda x: x**2)
    close(repeated(jacobian, x), [[2.0]])
    x.assign([5.0])
    close(jacobian(x), [[10.0]])


def test_more_arguments_and_keywords():
    jacobian = kg.jacobian(lambda x, c=1.0, *, flag=False: c * (x**2 if flag else x))
    x = tensor(3.0)
    close(repeated(jacobian, x), 1.0)
    close(jacobian(x, tensor(2.0)), 2.0)
    close(repeated(jacobian, x, flag=True), 6.0)
    close(jacobian(x, flag=False), 1.0)
    close(jacobian(x, flag=1), 6.0)
    close(jacobian(x, c=tensor(2.0)), 2.0)
    close(jacobian(x), 1.0)


def test_nested_arguments():
    jacobian = kg.jacobian(lambda w: sum(i * x for i, x in enumerate(w, 1)))
    a, b = tensor(1.0), tensor(2.0)
    close(repeated(jacobian, [a, b]), [1.0, 2.0])
    close(jacobian([b, a]), [1.0, 2.0])
    assert isinstance(jacobian((a, b)), tuple)
    close(jacobian([a, b, a]), [1.0, 2.0, 3.0])
    jacobian = kg.jacobian(lambda w: next(iter(w.values())) ** 2)
    close(repeated(jacobian, {"a": a, "b": b}), {"a": 2.0, "b": 0.0})
    # Here the order of the keys matters.
    close(jacobian({"b": b, "a": a}), {"b": 4.0, "a": 0.0})


def test_a_mask():
    masked = keras.Sequential([keras.Input((2,)), layers.Activation("linear")])
    fun = lambda x: masked(x) * (2.0 if get_keras_mask(x) is not None else 1.0)  # noqa: E731
    jacobian = kg.batch_jacobian(fun)
    x = tensor([[1.0, 2.0]])
    close(repeated(jacobian, x), [np.eye(2)])
    set_keras_mask(x, tensor([True]))
    close(jacobian(x), [2 * np.eye(2)])


def test_inside_a_tape_and_a_compiled_function():
    c = keras.Variable(2.0)
    jacobian = kg.jacobian(lambda x: c * x**2)
    x = tensor(3.0)
    close(repeated(jacobian, x), 12.0)
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = jacobian(x)
    close(tape.gradient(y, [x, c]), [4.0, 6.0])
    close(kg.grad(jacobian)(x), 4.0)
    close(kg.jit(lambda x: jacobian(x) + 1.0)(x), 13.0)
    close(jacobian(x), 12.0)


def test_in_a_scope_that_gives_other_values():
    c = keras.Variable(2.0)
    jacobian, jitted = kg.jacobian(lambda x: c * x), kg.jit(lambda x: c * x)
    x = tensor(3.0)
    close(repeated(jacobian, x), 2.0)
    close(repeated(jitted, x), 6.0)
    with StateScope([(c, tensor(5.0))]):
        close(jacobian(x), 5.0)
        close(jitted(x), 15.0)
    close(jacobian(x), 2.0)
    close(jitted(x), 6.0)


def test_what_jit_assigns_and_draws():
    count = keras.Variable(0.0)
    seeds = keras.random.SeedGenerator(0)

    @kg.jit
    def step(x):
        count.assign_add(1.0)
        return x + keras.random.normal((), seed=seeds)

    drawn = [float(step(tensor(0.0))) for _ in range(6)]
    assert len(set(drawn)) == 6
    close(count, 6.0)


def test_a_layer_that_is_frozen():
    model = model_of()
    fun = kg.jit(lambda x: float(len(model.trainable_variables)) * x)
    close(repeated(fun, tensor(1.0)), 4.0)
    model.layers[0].trainable = False
    close(fun(tensor(1.0)), 2.0)
    model.layers[1].bias.trainable = False
    close(fun(tensor(1.0)), 1.0)


def test_precision():
    dense = layers.Dense(1, use_bias=False, kernel_initializer=lambda shape, dtype: ops.full(shape, 1 / 3, dtype))
    model = keras.Sequential([keras.Input((1,)), dense])
    jacobian = kg.batch_jacobian(model)
    full = float(repeated(jacobian, tensor([[1.0]]))[0, 0, 0])
    dense.dtype_policy = "mixed_float16"
    assert float(jacobian(tensor([[1.0]]))[0, 0, 0]) != full


@pytest.mark.parametrize("transform", [kg.jit, kg.grad, kg.jacobian])
def test_an_attribute_in_a_slot(transform):
    class Factor:
        __slots__ = ("value",)

    factor = Factor()
    fun = transform(lambda x: factor.value * x)
    for value in (2.0, 3.0, tensor(4.0), 2.0):
        factor.value = value
        close(repeated(fun, tensor(1.0)), float(value))


@pytest.mark.parametrize("transform", [kg.jit, kg.grad, kg.jacobian])
def test_code_that_is_replaced(transform):
    # As a notebook does that reloads modules after each edit.
    def factor(x):
        return 2.0 * x

    fun = transform(lambda x: factor(x))
    close(repeated(fun, tensor(1.0)), 2.0)
    factor.__code__ = (lambda x: 3.0 * x).__code__
    close(repeated(fun, tensor(1.0)), 3.0)


@pytest.mark.parametrize(
    "name, values, fun",
    [
        ("image_data_format", ["channels_first", "channels_last"], lambda x: ops.sum(ops.max_pool(x, 2, 1)[:, 1])),
        (
            "epsilon",
            [1e-2, 1e-3],
            lambda x: ops.sum(x) * ops.max(keras.losses.binary_crossentropy(ops.ones((2,)), ops.zeros((2,)))),
        ),
    ],
)
@pytest.mark.parametrize("transform", [kg.jit, kg.grad, kg.jacobian])
def test_a_setting_of_keras(name, values, fun, transform):
    x = tensor(np.arange(27).reshape(1, 3, 3, 3))
    get, put = getattr(keras.config, name), getattr(keras.config, f"set_{name}")
    former, compiled_fun = get(), transform(fun)
    try:
        for value in values:
            put(value)
            close(repeated(compiled_fun, x), ops.convert_to_numpy(transform(lambda x: fun(x))(x)))
    finally:
        put(former)


@pytest.mark.parametrize("transform", [kg.jit, kg.batch_jacobian])
def test_lists_and_dicts_of_a_model(transform):
    # Keras puts a list or dict that is assigned to a layer into a class of its own.
    class Powers(keras.Model):
        def __init__(self):
            super().__init__()
            self.by_name = {"power": 1.0}
            self.factors = [1.0]

        def call(self, x):
            return self.factors[0] * x ** self.by_name["power"]

    model = Powers()
    fun = transform(lambda x: model(x))
    x = tensor([[1.0]])
    close(ops.sum(repeated(fun, x)), 1.0)
    model.factors[0] = 3.0
    close(ops.sum(repeated(fun, x)), 3.0)
    model.by_name["power"] = 2.0
    close(ops.sum(repeated(fun, x)), 6.0 if transform is kg.batch_jacobian else 3.0)
    model.factors = [4.0]
    close(ops.sum(repeated(fun, x)), 8.0 if transform is kg.batch_jacobian else 4.0)


@pytest.mark.parametrize("make", [collections.OrderedDict, collections.Counter])
def test_other_dicts(make):
    factors = make({"a": 2.0})
    fun = kg.jit(lambda x: factors["a"] * x)
    close(repeated(fun, tensor(1.0)), 2.0)
    factors["a"] = 3.0
    close(repeated(fun, tensor(1.0)), 3.0)


def test_a_change_in_another_thread_while_a_call_runs(monkeypatch):
    factor = [2.0]
    fun, x, note = kg.jit(lambda x: factor[0] * x), tensor(1.0), compiled.Programs.note_call
    for factor[0] in (3.0, 2.0):
        repeated(fun, x)

    def note_late(*args):
        monkeypatch.setattr(compiled.Programs, "note_call", note)
        factor[0] = 3.0
        close(repeated(fun, x), 3.0)
        note(*args)

    monkeypatch.setattr(compiled.Programs, "note_call", note_late)
    factor[0] = 4.0
    fun(x)
    factor[0] = 2.0
    close(fun(x), 2.0)
    close(fun(x), 3.0)
