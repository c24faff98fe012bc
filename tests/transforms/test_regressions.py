"""Defects that were found by use and by review, each with the case that shows it."""

import gc
import operator
import threading
import warnings
import weakref

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.transforms import compiled
from tests.cases import close, tensor
from tests.compilers import with_unknown_batch

X = np.array([[1.0, 2.0], [3.0, 5.0]], "float32")
combine = operator.add


class TestUnknownBatch:
    @pytest.mark.parametrize("chunk_size", [None, 1])
    @pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
    def test_batch_jacobian(self, mode, chunk_size):
        jacobian = with_unknown_batch(kg.batch_jacobian(lambda x: x**3, mode=mode, chunk_size=chunk_size), (2,))
        close(jacobian(tensor(X)), np.stack([np.diag(3 * x**2) for x in X]), rtol=1e-5)

    @pytest.mark.parametrize("count", [0, 2])
    def test_fewer_rows_than_a_chunk(self, count):
        jacobian = with_unknown_batch(kg.jacobian(lambda x: x**2, mode="reverse", chunk_size=9), (2,))
        expected = np.einsum("bi,bc,ij->bicj", 2 * X[:count], np.eye(count), np.eye(2))
        close(jacobian(tensor(X[:count])), expected)

    def test_tape_and_full_jacobian(self):
        def both(x):
            with kg.GradientTape() as tape:
                tape.watch(x)
                y = x**2
            return tape.batch_jacobian(y, x), kg.jacobian(lambda x: ops.sum(x**2, axis=0))(x)

        by_example, full = with_unknown_batch(both, (2,))(tensor(X))
        close(by_example, np.stack([np.diag(2 * x) for x in X]))
        close(full, np.einsum("ki,bi->kbi", np.eye(2), 2 * X))

    def test_in_fit_with_a_last_batch_that_is_smaller(self):
        class Penalized(keras.Model):
            def __init__(self):
                super().__init__()
                self.dense = layers.Dense(1)

            def call(self, x):
                return self.dense(x)

            def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
                return ops.mean(kg.batch_jacobian(lambda x: self.dense(x) ** 2)(ops.convert_to_tensor(x)) ** 2)

        model = Penalized()
        model.compile("sgd")
        x = np.random.default_rng(0).normal(size=(10, 2)).astype("float32")
        history = model.fit(x, x[:, :1], batch_size=4, epochs=2, verbose=0)
        assert np.isfinite(history.history["loss"]).all()


class TestWithoutGradMode:
    """Keras builds, evaluates and predicts without torch's grad mode."""

    def test_gradient_by_a_variable_in_a_call(self):
        class Sharpness(layers.Layer):
            def __init__(self):
                super().__init__()
                self.scale = self.add_weight(shape=(2,), initializer="ones")

            def call(self, x):
                return x * ops.sum(kg.grad(lambda s: ops.sum(s**3))(self.scale))

        model = keras.Sequential([keras.Input((2,)), Sharpness()])
        close(model.predict(X, verbose=0), 6 * X)

    def test_products(self, backend):
        if backend == "torch":
            import torch

            quiet = torch.no_grad()
        else:
            quiet = warnings.catch_warnings()
        v = keras.Variable([1.0, 2.0])
        with quiet:
            close(kg.grad(_cubes)(v), [3.0, 12.0])
            close(kg.hvp(_cubes, (v,), (tensor([1.0, 1.0]),))[0], [6.0, 12.0])
            close(kg.hessian(_cubes)(v), np.diag([6.0, 12.0]))


def _cubes(x):
    return ops.sum(x**3)


class TestSurroundings:
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
        alone = ops.convert_to_numpy(layer(X, training=False))
        mixed = ops.convert_to_numpy(layer(X, training=True))
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
            jacobian(X, training=True)
            own.bn.trainable = False
            close(jacobian(X, training=True), np.tile(np.eye(2) / np.sqrt(1 + 1e-3), (2, 1, 1)), rtol=1e-4)

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
        assert sum(r() is not None for r in alive) <= compiled.MOST_SURROUNDINGS

    def test_floatx(self):
        try:
            keras.config.set_floatx("float16")
            assert "float16" in str(kg.jacobian(lambda x: x * x)(2.0).dtype)
        finally:
            keras.config.set_floatx("float32")
        close(kg.jacobian(lambda x: x * x)(2.0), 4.0)


def test_a_variable_as_aux_has_the_value_of_the_call():
    c = keras.Variable(1.0)

    def fun(x):
        c.assign(ops.sum(x))
        return ops.sum(x) * c, c

    _, aux = kg.grad(fun, has_aux=True)(tensor([1.0, 2.0]))
    close(aux, 3.0)
    close(c.value, 1.0)


class TestPerExample:
    def test_a_variable_under_a_tape(self):
        v = keras.Variable(3.0)
        with kg.GradientTape() as tape:
            y = ops.sum(kg.per_example_grad(lambda w, x: ops.sum(w * w * v * x))(2.0, tensor([1.0, 2.0])))
        close(tape.gradient(y, v), 12.0)

    def test_a_gradient_inside(self):
        found = kg.per_example_grad(lambda w, x: ops.sum(kg.grad(lambda x: ops.sum(w * x**3))(x) ** 2))(
            tensor(2.0), tensor([1.0, 2.0])
        )
        close(found, [36.0, 576.0], rtol=1e-5)

    def test_a_reversed_gradient(self):
        found = kg.per_example_grad(lambda w, x: ops.sum(kg.reverse_gradient(w) * x))(2.0, tensor([1.0, 2.0]))
        close(found, [-1.0, -2.0])

    def test_no_examples(self):
        found = kg.per_example_grad(lambda w, x: ops.sum(w * x))(tensor([2.0]), np.zeros((0, 1), "float32"))
        assert tuple(found.shape) == (0, 1)


class TestKernelHessian:
    def test_a_regularizer_whose_gradient_vanishes(self):
        layer = layers.Dense(1, kernel_initializer="zeros")
        model = keras.Sequential([layers.Input((2,)), layer])
        with pytest.raises(ValueError, match="through the layer's calls alone"):
            kg.kernel_hessian(lambda x: ops.sum(model(x) ** 2) + 10 * ops.sum(layer.kernel**2), layer)(X)

    def test_no_examples(self):
        layer = layers.Dense(3)
        model = keras.Sequential([layers.Input((2,)), layer])
        found = kg.kernel_hessian(lambda x: ops.sum(model(x) ** 2), layer)(X[:0])
        close(found, np.zeros((2, 3, 2, 3)))

    def test_two_threads(self):
        layer = layers.Dense(1, use_bias=False)
        model = keras.Sequential([layers.Input((2,)), layer])
        call, found = layer.call, []

        def run():
            found.append(ops.convert_to_numpy(kg.kernel_hessian(lambda x: ops.sum(model(x) ** 2), layer)(X)))

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for hessian in found:
            close(hessian[:, 0, :, 0], 2 * X.T @ X, rtol=1e-4)
        assert len(found) == 4 and layer.call == call


def test_none_as_an_argument_is_named():
    with pytest.raises(ValueError, match="Argument 1 under `grad` must be a tensor.*None"):
        kg.grad(lambda p, q: ops.sum(p), argnums=(0, 1))(tensor(X), {"b": None})
