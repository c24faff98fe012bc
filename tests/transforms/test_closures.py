"""What all that compiles sees of a function's captured values: with each change, the next call gives the new value."""

import functools
import gc
import operator
import types
import weakref

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.transforms import compiled
from keras_gradtools.transforms.closures import captured_values
from tests.cases import close, tensor
from tests.compilers import compiled_by

factor = 2.0
entries = [2.0]
settings = types.SimpleNamespace(factor=2.0, inner=types.SimpleNamespace(factor=2.0))


def _of_one(batch_jacobian):
    return lambda x: batch_jacobian(ops.reshape(x, (1, 1)))[0, 0, 0]


# Of `fun(x) = c x`, with another c after each change: its value, and its derivative, at 1.
WAYS = {"kg.jit": kg.jit, "jacobian": kg.jacobian}
MORE = {
    "kg.jit of grad": lambda fun: kg.jit(kg.grad(fun)),
    "kg.jit of jacobian": lambda fun: kg.jit(kg.jacobian(fun)),
    "jacobian in chunks": lambda fun: kg.jacobian(fun, chunk_size=1),
    "batch_jacobian": lambda fun: _of_one(kg.batch_jacobian(fun)),
    "hessian": lambda fun: kg.hessian(lambda x: fun(x * x) / 2),
}


def check(compile, fun, change):
    compiled = compile(fun)
    # From the third call of a program on, a repeated call takes a shorter way.
    for _ in range(4):
        close(compiled(tensor(1.0)), 2.0)
    change()
    for _ in range(4):
        close(compiled(tensor(1.0)), 7.0)


@pytest.mark.parametrize("compile", MORE.values(), ids=MORE)
def test_a_global_behind_a_function(compile, monkeypatch):
    def inner(x):
        return factor * x

    check(compile, lambda x: inner(x), lambda: monkeypatch.setitem(globals(), "factor", 7.0))


@pytest.mark.parametrize("compile", WAYS.values(), ids=WAYS)
class TestSeen:
    def test_a_global(self, compile, monkeypatch):
        check(compile, lambda x: factor * x, lambda: monkeypatch.setitem(globals(), "factor", 7.0))

    def test_a_closure(self, compile):
        c = 2.0

        def change():
            nonlocal c
            c = 7.0

        check(compile, lambda x: c * x, change)

    def test_the_closure_of_a_function_in_it(self, compile):
        c = tensor(2.0)

        def inner(x):
            return c * x

        def change():
            nonlocal c
            c = tensor(7.0)

        check(compile, lambda x: [inner][0](x), change)

    def test_a_default_argument(self, compile):
        def fun(x, c=2.0, *, d=1.0):
            return c * d * x

        def change():
            fun.__defaults__ = (3.5,)
            fun.__kwdefaults__["d"] = 2.0

        check(compile, fun, change)

    def test_a_list(self, compile):
        check(compile, lambda x: entries[0] * x, lambda: entries.__setitem__(0, 7.0))
        entries[:] = [2.0]

    def test_a_dict_in_a_list(self, compile):
        options = [{"c": tensor(2.0)}]
        check(compile, lambda x: options[0]["c"] * x, lambda: options[0].update(c=tensor(7.0)))

    def test_an_attribute(self, compile):
        check(compile, lambda x: settings.factor * x, lambda: setattr(settings, "factor", 7.0))
        settings.factor = 2.0

    def test_an_attribute_of_an_attribute(self, compile):
        check(compile, lambda x: settings.inner.factor * x, lambda: setattr(settings.inner, "factor", 7.0))
        settings.inner.factor = 2.0

    def test_an_attribute_of_a_class(self, compile):
        class Settings:
            factor = 2.0

        check(compile, lambda x: Settings.factor * x, lambda: setattr(Settings, "factor", 7.0))

    def test_an_attribute_that_a_method_reads(self, compile):
        scaled = Scaled(2.0)
        check(compile, scaled.outer, lambda: setattr(scaled, "c", 7.0))
        scaled.c = 2.0
        check(compile, scaled, lambda: setattr(scaled, "c", 7.0))
        scaled.c = 2.0
        check(compile, lambda x: scaled.outer(x), lambda: setattr(scaled, "c", 7.0))

    def test_a_method_of_another_object(self, compile):
        method = Scaled(2.0).outer

        def change():
            nonlocal method
            method = Scaled(7.0).outer

        check(compile, lambda x: method(x), change)

    def test_a_partial(self, compile):
        c = {"c": 2.0}
        fun = functools.partial(lambda x, c: c["c"] * x, c=c)
        check(compile, fun, lambda: c.update(c=7.0))

    def test_another_layer(self, compile):
        model = keras.Sequential([layers.Rescaling(2.0)])

        def change():
            model.pop()
            model.add(layers.Rescaling(7.0))

        check(compile, lambda x: ops.reshape(model(ops.reshape(x, (1, 1))), ops.shape(x)), change)

    def test_the_attribute_of_a_layer(self, compile):
        model = keras.Sequential([keras.Input((1,)), layers.Rescaling(2.0)])
        fun = lambda x: ops.reshape(model(ops.reshape(x, (1, 1))), ops.shape(x))  # noqa: E731
        check(compile, fun, lambda: setattr(model.layers[-1], "scale", 7.0))

    def test_the_attribute_of_a_layer_of_ones_own(self, compile):
        model = keras.Sequential([keras.Input((1,)), ScaledLayer()])
        fun = lambda x: ops.reshape(model(ops.reshape(x, (1, 1))), ops.shape(x))  # noqa: E731
        check(compile, fun, lambda: setattr(model.layers[-1].settings, "c", 7.0))

    def test_an_activation(self, compile):
        dense = layers.Dense(1, activation=lambda x: 2 * x, kernel_initializer="ones")
        model = keras.Sequential([keras.Input((1,)), dense])
        fun = lambda x: ops.reshape(model(ops.reshape(x, (1, 1))), ops.shape(x))  # noqa: E731
        check(compile, fun, lambda: setattr(dense, "activation", lambda x: 7 * x))

    def test_weights(self, compile):
        dense = layers.Dense(1, kernel_initializer=keras.initializers.Constant(2.0))
        model = keras.Sequential([keras.Input((1,)), dense])
        fun = lambda x: ops.reshape(model(ops.reshape(x, (1, 1))), ops.shape(x))  # noqa: E731
        check(compile, fun, lambda: model.set_weights([np.full((1, 1), 7.0), np.zeros(1)]))


class Scaled:
    def __init__(self, c):
        self.c = c

    @property
    def coefficient(self):
        return self.c

    def inner(self, x):
        return self.coefficient * x

    def outer(self, x):
        return self.inner(x)

    def __call__(self, x):
        return self.outer(x)


class ScaledLayer(layers.Layer):
    def __init__(self):
        super().__init__()
        self.settings = types.SimpleNamespace(c=2.0)

    def call(self, x):
        return self.scaled(x)

    def scaled(self, x):
        return self.settings.c * x


class TestTheModelUnderAJit:
    def test_a_layer_that_is_frozen_after_the_first_call(self):
        model = keras.Sequential([keras.Input((2,)), layers.Dense(2), layers.Dense(1)])

        @kg.jit
        def gradients(x):
            with kg.GradientTape() as tape:
                y = ops.sum(model(x))
            return tape.gradient(y, model.trainable_variables)

        x = tensor([[1.0, 2.0]])
        assert len(gradients(x)) == 4
        model.layers[0].trainable = False
        assert len(gradients(x)) == 2
        model.trainable = False
        assert len(gradients(x)) == 0
        model.trainable = True
        assert len(gradients(x)) == 4

    def test_a_variable_that_is_frozen(self):
        v = keras.Variable(3.0)

        @kg.jit
        def gradient(x):
            with kg.GradientTape() as tape:
                y = v * v * x
            return tape.gradient(y, v, unconnected_gradients="zero")

        close(gradient(2.0), 12.0)
        v.trainable = False
        close(gradient(2.0), 0.0)

    def test_batch_normalization_and_dropout(self):
        model = keras.Sequential([keras.Input((2,)), layers.BatchNormalization(), layers.Dropout(0.5, seed=1)])
        call = kg.jit(lambda x: model(x, training=True))
        x = tensor([[1.0, 2.0], [3.0, 4.0]])
        call(x)
        model.layers[1].rate = 0.0
        close(ops.abs(call(x)), np.ones((2, 2)), rtol=2e-3)
        model.layers[0].trainable = False
        close(call(x), ops.convert_to_numpy(model(x)))

    def test_precision(self):
        model = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
        call = kg.jit(lambda x: model(x))
        assert "float32" in str(call(tensor([[1.0]])).dtype)
        model.layers[0].dtype_policy = "mixed_float16"
        assert "float16" in str(call(tensor([[1.0]])).dtype)

    @pytest.mark.float64
    def test_floatx(self):
        call = kg.jit(lambda x: ops.ones((1,)) * x)
        try:
            assert "float32" in str(call(2.0).dtype)
            keras.config.set_floatx("float64")
            assert "float64" in str(call(2.0).dtype)
        finally:
            keras.config.set_floatx("float32")

    def test_an_attribute_of_an_argument(self):
        class Step:
            c = 2.0

            @kg.jit
            def __call__(self, x):
                return self.c * x

        step = Step()
        close(step(3.0), 6.0)
        step.c = 7.0
        close(step(3.0), 21.0)


class TestNotTracedAgain:
    """By what a function changes itself, and by what it does not read."""

    def count(self, fun, between, calls):
        compiled = kg.jit(fun)
        compiled_by(lambda: compiled(tensor(1.0)))
        traced = len(calls)
        for _ in range(3):
            between()
            compiled(tensor(1.0))
        assert len(calls) == traced

    def test_by_a_list_that_it_appends_to(self):
        calls = []

        def fun(x):
            calls.append(1)
            return 2 * x

        self.count(lambda x: fun(x), lambda: None, calls)

    def test_by_an_attribute_that_it_counts_in(self):
        class Counted:
            def __init__(self):
                self.calls, self.steps, self.log = [], 0, {}

            def fun(self, x):
                self.calls.append(1)
                self.steps += 1
                self.log[self.steps] = "traced"
                return 2 * x

        counted = Counted()
        self.count(counted.fun, lambda: None, counted.calls)

    def test_by_an_attribute_that_it_does_not_read(self):
        calls = []
        step = types.SimpleNamespace(epoch=0, c=2.0, history=[])

        def fun(x):
            calls.append(1)
            return step.c * x

        def between():
            step.epoch += 1
            step.history.append(step.epoch)

        self.count(fun, between, calls)

    def test_by_training(self):
        calls = []
        model = keras.Sequential([keras.Input((1,)), layers.Dense(1), layers.BatchNormalization()])
        model.compile("sgd", "mse")

        def fun(x):
            calls.append(1)
            return model(ops.reshape(x, (1, 1)))

        self.count(fun, lambda: model.fit(np.ones((2, 1)), np.ones((2, 1)), verbose=0), calls)


def test_too_much_runs_eagerly_and_says_so():
    def multiply(n):
        return lambda x: n * x

    functions = [multiply(n) for n in range(1200)]
    fun = kg.jit(lambda x: functions[3](x))
    with pytest.warns(UserWarning, match="`kg.jit` runs <lambda> eagerly.* Pass them as arguments instead"):
        close(fun(tensor(1.0)), 3.0)


def test_installed_packages_are_not_looked_into():
    import scipy.optimize

    fun = lambda x: scipy.optimize.rosen(x)  # noqa: E731
    assert len(captured_values(fun).key) <= 3


combine = operator.add


ROWS = np.array([[1.0, 2.0], [3.0, 5.0]], "float32")


class TestWhatAProgramDependsOn:
    def test_the_mode_of_the_call_around(self):
        class Inner(layers.Layer):
            def __init__(self):
                super().__init__()
                self.bn = layers.BatchNormalization()
                self.jacobian = kg.batch_jacobian(lambda x: self.bn(x))

            def build(self, shape):
                self.bn.build(shape)

            def call(self, x, training=False):
                return self.jacobian(x)

        layer = Inner()
        alone = ops.convert_to_numpy(layer(ROWS, training=False))
        mixed = ops.convert_to_numpy(layer(ROWS, training=True))
        close(alone, np.tile(np.eye(2) / np.sqrt(1 + 1e-3), (2, 1, 1)), rtol=1e-4)
        assert np.abs(mixed).max() < 0.1  # two examples, normalized, are always -1 and 1

    def test_a_frozen_layer_in_a_layer_of_ones_own(self):
        class Own(layers.Layer):
            def __init__(self):
                super().__init__()
                self.bn = layers.BatchNormalization()

            def build(self, shape):
                self.bn.build(shape)

            def call(self, x, training=None):
                return self.bn(x, training=training)

        own = Own()
        own.build((None, 2))
        listed = [own]
        for fun in (own, lambda x, training: listed[0](x, training=training)):
            own.bn.trainable = True
            jacobian = kg.batch_jacobian(fun)
            jacobian(ROWS, training=True)
            own.bn.trainable = False
            close(jacobian(ROWS, training=True), np.tile(np.eye(2) / np.sqrt(1 + 1e-3), (2, 1, 1)), rtol=1e-4)

    def test_a_builtin(self, monkeypatch):
        def fun(x):
            return combine(x, 3.0 * x)

        close(kg.jacobian(fun)(tensor([1.0])), [[4.0]])
        monkeypatch.setitem(globals(), "combine", operator.mul)
        close(kg.jacobian(fun)(tensor([1.0])), [[6.0]])

    def test_a_callable_object(self):
        factor = 1.0

        class Scaled:
            def __call__(self, x):
                return factor * x

        fun = Scaled()
        close(kg.jacobian(fun)(tensor([1.0])), [[1.0]])
        factor = 4.0
        close(kg.jacobian(fun)(tensor([1.0])), [[4.0]])

    def test_a_function_as_an_argument(self):
        factor = 1.0

        def scaled(x):
            return factor * x

        jacobian = kg.jacobian(lambda x, g: g(x))
        close(jacobian(tensor([1.0]), scaled), [[1.0]])
        factor = 4.0
        close(jacobian(tensor([1.0]), scaled), [[4.0]])

    def test_zeros_of_either_sign(self):
        s = 0.0

        def fun(x):
            return ops.where(1.0 / ops.convert_to_tensor(s) > 0, x, 5.0 * x)

        close(kg.jacobian(fun)(tensor([1.0])), [[1.0]])
        s = -0.0
        close(kg.jacobian(fun)(tensor([1.0])), [[5.0]])

    def test_arrays_that_were_let_go_are_let_go(self):
        data = tensor([1.0, 2.0])

        def fun(x):
            return x * data

        alive = []
        for i in range(9):
            data = tensor([float(i), 2.0])
            if keras.config.backend() != "tensorflow":  # its tensors cannot be referred to weakly
                alive.append(weakref.ref(data))
            close(kg.jacobian(fun)(tensor([1.0, 1.0])), np.diag([float(i), 2.0]))
        gc.collect()
        assert sum(r() is not None for r in alive) <= compiled.MOST_BY_CAPTURED_VALUES

    def test_floatx(self):
        try:
            keras.config.set_floatx("float16")
            assert "float16" in str(kg.jacobian(lambda x: x * x)(2.0).dtype)
        finally:
            keras.config.set_floatx("float32")
        close(kg.jacobian(lambda x: x * x)(2.0), 4.0)
