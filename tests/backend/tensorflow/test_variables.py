"""Raw variables of TensorFlow's: watched when they are read, returned, and sources of tapes and transforms."""

import gc
import weakref

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from tests.cases import close

if keras.backend.backend() != "tensorflow":
    pytest.skip("these are about TensorFlow", allow_module_level=True)

import tensorflow as tf  # noqa: E402

A = np.array([1.0, 2.0], "float32")


@pytest.fixture
def v():
    return tf.Variable(A)


def same(found, expected):
    assert isinstance(found, tuple)
    assert list(map(id, found)) == list(map(id, expected))


class TestTape:
    def test_as_in_tensorflow(self, v):
        for tape_class in (tf.GradientTape, kg.GradientTape):
            with tape_class() as tape:
                y = tf.reduce_sum(v * v * v)
            same(tape.watched_variables(), [v])
            close(tape.gradient(y, tape.watched_variables()), (3 * A**2,))
            same(tape.watched_variables(), [v])

    @pytest.mark.parametrize("persistent", [False, True])
    def test_after_a_derivative_and_a_reset(self, v, persistent):
        other = tf.Variable(3.0)
        with kg.GradientTape(persistent=persistent) as tape:
            y = tf.reduce_sum(v * v)
            tape.reset()
            y = other * other
            close(tape.gradient(y, other), 6.0)
            same(tape.watched_variables(), [other])
        same(tape.watched_variables(), [other])

    def test_what_is_not_trainable_or_not_floating(self, v):
        constant, asked_for, integers = (tf.Variable(x, trainable=False) for x in (2.0, 3.0, 4))
        counter = tf.Variable(4)
        with kg.GradientTape(persistent=True) as tape:
            tape.watch(asked_for)
            y = tf.reduce_sum(v) * constant * asked_for * tf.cast(integers * counter, "float32")
        same(tape.watched_variables(), [v, asked_for])
        assert tape.gradient(y, constant) is None
        close(tape.gradient(y, asked_for), 2.0 * 3.0 * 16)

    def test_nothing_is_watched_unless_asked_for(self, v):
        with kg.GradientTape(watch_accessed_variables=False) as tape:
            y = tf.reduce_sum(v)
        same(tape.watched_variables(), [])
        assert tape.gradient(y, v) is None

    def test_beside_those_of_keras(self, v):
        layer = keras.layers.Dense(1)
        layer.build((None, 2))
        frozen = keras.layers.Dense(2, use_bias=False)
        frozen.build((None, 2))
        frozen.trainable = False  # after it was made: TensorFlow's own flag says that it is trainable
        with kg.GradientTape(persistent=True) as tape:
            y = tf.reduce_sum(layer(frozen(v[None])))
        same(tape.watched_variables(), [layer.kernel, layer.bias, v])
        assert tape.gradient(y, frozen.kernel) is None
        kernel = ops.convert_to_numpy(frozen.kernel) @ ops.convert_to_numpy(layer.kernel)
        close(tape.gradient(y, v), kernel[:, 0])

    def test_of_a_graph_that_was_traced_before(self, v):
        layer, frozen = (keras.layers.Dense(2, use_bias=False) for _ in range(2))
        layer.build((None, 2))
        frozen.build((None, 2))
        frozen.trainable = False
        traced = tf.function(lambda: tf.reduce_sum(layer(frozen(v[None]))))
        traced()
        with kg.GradientTape() as tape:
            y = traced()
        assert set(map(id, tape.watched_variables())) == {id(v), id(layer.kernel)}
        assert tape.gradient(y, [v, layer.kernel])[0] is not None

    def test_made_inside(self):
        with kg.GradientTape(persistent=True) as tape:
            v = tf.Variable(3.0)
            y = v * v
            v.assign(5.0)
        same(tape.watched_variables(), [v])
        close(tape.gradient(y, v), 6.0)

    def test_every_method_and_nesting(self, v):
        with kg.GradientTape(persistent=True) as outer:
            with kg.GradientTape(persistent=True) as tape:
                y = v**3
            slope = tape.gradient(y, {"v": [v]})["v"][0]
        same(outer.watched_variables(), [v])
        close(tape.jacobian(y, v), np.diag(3 * A**2))
        close(tape.jacobian(y, v, mode="forward"), np.diag(3 * A**2))
        close(tape.jvp(y, v, A), 3 * A**3)
        close(tape.linearize(y, v)(v), 3 * A**3)
        close(outer.gradient(slope, v), 6 * A)
        close(tape.jacobian(v, v), np.eye(2))
        x = tf.Variable(A[:, None])
        with kg.GradientTape() as tape:
            y = x * x
        close(tape.batch_jacobian(y, (x,)), (2 * A[:, None, None],))

    def test_zeros_for_one_are_no_read_of_it(self, v):
        other = tf.Variable([5.0, 6.0])
        with kg.GradientTape() as outer:
            with kg.GradientTape(persistent=True) as tape:
                y = v * v
            found = tape.gradient(y, [v, other], unconnected_gradients="zero")
            found += [tape.jvp(y, [v, other], [A, None])]
        close(found, [2 * A, np.zeros(2), 2 * A**2])
        same(outer.watched_variables(), [v])

    def test_under_a_strategy(self):
        strategy = tf.distribute.MirroredStrategy(["CPU:0"])
        with strategy.scope():
            v = tf.Variable(3.0)
            layer = keras.layers.Dense(1, use_bias=False)
            layer.build((None, 1))
        frozen = keras.layers.Dense(1, use_bias=False)
        with strategy.scope():
            frozen.build((None, 1))
        frozen.trainable = False
        seen = []

        def on_replica():
            with kg.GradientTape() as tape:
                y = tf.reduce_sum(layer(frozen(tf.ones((1, 1))))) * v
            seen[:] = [tape.watched_variables()]
            return tape.gradient(y, [layer.kernel, v])

        by_kernel, by_v = strategy.run(on_replica)
        same(*seen, [layer.kernel, v])
        kernel, other = (ops.convert_to_numpy(x.kernel) for x in (layer, frozen))
        close(by_kernel, other * 3.0)
        close(by_v, (kernel * other)[0, 0])

    def test_no_variable_is_kept_alive(self):
        layer = keras.layers.Dense(1)
        layer.build((None, 2))
        gone = weakref.ref(layer.kernel)
        with kg.GradientTape():
            layer(tf.ones((1, 2)))
        value = layer.kernel._value
        del layer
        gc.collect()
        assert gone() is None and value is not None


SUM_OF_CUBES = {
    "grad": (lambda f: kg.grad(f), lambda a: 3 * a**2),
    "value_and_grad": (lambda f: lambda v: kg.value_and_grad(f)(v)[1], lambda a: 3 * a**2),
    "vjp": (lambda f: lambda v: kg.vjp(f, v)[1](1.0)[0], lambda a: 3 * a**2),
    "jvp": (lambda f: lambda v: kg.jvp(f, (v,), (v,))[1], lambda a: np.sum(3 * a**3)),
    "linearize": (lambda f: lambda v: kg.linearize(f, v)[1](v), lambda a: np.sum(3 * a**3)),
    "jacobian": (lambda f: kg.jacobian(f), lambda a: 3 * a**2),
    "chunks": (lambda f: kg.jacobian(lambda v: v**3, chunk_size=1), lambda a: np.diag(3 * a**2)),
    "batch_jacobian": (
        lambda f: lambda v: kg.batch_jacobian(lambda v: v**3)(tf.Variable(v[:, None])),
        lambda a: 3 * a[:, None, None] ** 2,
    ),
    "hessian": (lambda f: kg.hessian(f), lambda a: np.diag(6 * a)),
    "hvp": (lambda f: lambda v: kg.hvp(f, (v,), (v,))[0], lambda a: 6 * a**2),
    "per_example_grad": (
        lambda f: lambda v: kg.per_example_grad(lambda v, x: x * f(v) if not x.shape else x[0] * f(v))(v, A),
        lambda a: A[:, None] * 3 * a**2,
    ),
}


@pytest.mark.parametrize("compile", [lambda fun: fun, kg.jit, tf.function], ids=["eager", "kg.jit", "tf.function"])
@pytest.mark.parametrize("name", SUM_OF_CUBES)
def test_transforms(name, compile, v):
    transform, expected = SUM_OF_CUBES[name]
    fun = transform(lambda v: tf.reduce_sum(v**3))
    if name == "batch_jacobian":
        x = tf.Variable(A[:, None])
        close(compile(kg.batch_jacobian(lambda v: v**3))(x), expected(A))
        return
    fun = compile(fun)
    close(fun(v), expected(A))
    v.assign(2 * A)
    close(fun(v), expected(2 * A))
    close(fun(tf.Variable(3 * A)), expected(3 * A))


def test_one_that_a_transform_closes_over(v):
    by_one = kg.jacobian(lambda x: v * x)
    close(by_one(A), np.diag(A))
    v.assign(5 * A)
    close(by_one(A), np.diag(5 * A))


def test_in_aux_it_stands_for_the_value_that_it_has_then(v):
    _, (aux,) = kg.grad(lambda x: (tf.reduce_sum(x * v), [v]), has_aux=True)(A)
    v.assign(5 * A)
    close(aux, A)
    assert not isinstance(aux, tf.Variable)
