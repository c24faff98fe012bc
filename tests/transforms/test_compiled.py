"""What transforms that compile themselves keep, and what they must not: stale values, models, too many programs."""

import gc
import warnings
import weakref

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.transforms import compiled
from tests.cases import close, tensor
from tests.compilers import compiled_by

X = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], "float32")
scale = tensor(2.0)


def model():
    return keras.Sequential([layers.Input((2,)), layers.Dense(3, activation="tanh"), layers.Dense(1)])


def counting(fun):
    calls = []

    def counted(x):
        calls.append(1)
        return fun(x)

    return counted, calls


class TestTraces:
    @pytest.mark.parametrize("transform", [kg.jacobian, kg.batch_jacobian, lambda f: kg.jacobian(f, chunk_size=2)])
    def test_a_second_call_runs_no_python(self, transform):
        fun, calls = counting(ops.tanh)
        first = compiled_by(lambda: transform(fun)(tensor(X)))
        traced = len(calls)
        # Another function of the same name for the same thing, as a notebook's cell makes it.
        close(transform(fun)(tensor(X + 0)), ops.convert_to_numpy(first))
        transform(fun)(X)
        assert traced and len(calls) == traced
        transform(fun)(tensor(X[:2]))
        assert len(calls) > traced

    def test_of_a_function_with_functions_in_it(self):
        calls = []

        def fun(x):
            calls.append(1)
            return sum(power(x) for power in [lambda x, n=n: x**n for n in range(1, 3)])

        close(compiled_by(lambda: kg.jacobian(fun)(2.0)), 5.0)
        traced = len(calls)
        close(kg.jacobian(fun)(3.0), 7.0)
        assert len(calls) == traced

    def test_of_a_hessian(self):
        fun, calls = counting(lambda x: ops.sum(x**3))
        close(compiled_by(lambda: kg.hessian(fun)(tensor([1.0, 2.0]))), np.diag([6.0, 12.0]))
        traced = len(calls)
        close(kg.hessian(fun)(tensor([2.0, 3.0])), np.diag([12.0, 18.0]))
        assert len(calls) == traced

    def test_floats_are_inputs(self):
        fun, calls = counting(lambda x: x * x)
        close(compiled_by(lambda: kg.jacobian(fun)(2.0)), 4.0)
        traced = len(calls)
        close(kg.jacobian(fun)(3.0), 6.0)
        assert len(calls) == traced

    def test_other_constants_are_other_programs(self):
        fun = kg.jacobian(lambda x, power: x**power)
        close(fun(tensor([3.0]), power=2), [[6.0]])
        close(fun(tensor([3.0]), power=3), [[27.0]])

    def test_two_names_are_two_programs(self):
        def fun(x):
            return 2 * x

        def body(fun, x):
            return fun(x), None

        def other(fun, x):
            return -fun(x), None

        x = tensor([1.0])
        for name, run, value in (("a", body, 2.0), ("b", other, -2.0), ("a", body, 2.0)):
            close(compiled.run(name, fun, run, ("options",), (x,), {})[0], [value])

    def test_programs_are_bounded(self):
        fun = lambda x, n: x * n  # noqa: E731
        for n in range(compiled.MOST_PROGRAMS + 3):
            close(kg.jacobian(fun)(tensor([1.0]), n), [[float(n)]])
        assert len(compiled._functions[fun].by_key) == compiled.MOST_PROGRAMS


class TestNothingIsStale:
    def test_new_weights(self):
        m = model()
        jacobian = kg.batch_jacobian(m)
        first = ops.convert_to_numpy(jacobian(X))
        m.set_weights([2 * w for w in m.get_weights()])
        second = ops.convert_to_numpy(jacobian(X))
        close(kg.batch_jacobian(lambda x: m(x))(X), second, atol=1e-5)
        assert np.abs(first - second).max() > 1e-3
        m.set_weights([0 * w for w in m.get_weights()])
        close(jacobian(X), np.zeros((3, 1, 2)))

    def test_weights_after_fit(self):
        m = model()
        m.compile("adam", "mse")
        jacobian = kg.batch_jacobian(m)
        jacobian(X)
        m.fit(X, X[:, :1], epochs=1, verbose=0)
        close(jacobian(X), ops.convert_to_numpy(kg.batch_jacobian(lambda x: m(x), mode="forward")(X)), atol=1e-5)

    def test_a_closed_over_array(self):
        a = tensor(2.0)

        def fun(x):
            return a * x

        close(kg.jacobian(fun)(tensor([1.0])), [[2.0]])
        a = tensor(3.0)
        close(kg.jacobian(fun)(tensor([1.0])), [[3.0]])

    def test_a_global_array(self, monkeypatch):
        fun = kg.jacobian(lambda x: scale * x)
        close(fun(tensor([1.0])), [[2.0]])
        monkeypatch.setitem(globals(), "scale", tensor(5.0))
        close(fun(tensor([1.0])), [[5.0]])

    def test_a_number_behind_another_function(self):
        factor = 2.0

        def inner(x):
            return factor * x

        fun = kg.jacobian(lambda x: inner(x))
        close(fun(tensor([1.0])), [[2.0]])
        factor = 3.0
        close(fun(tensor([1.0])), [[3.0]])

    def test_a_layer_that_was_frozen(self):
        m = keras.Sequential([layers.Input((2,)), layers.BatchNormalization()])
        jacobian = kg.batch_jacobian(m)
        mixed = ops.convert_to_numpy(jacobian(X, training=True))
        m.layers[0].trainable = False
        alone = ops.convert_to_numpy(jacobian(X, training=True))
        close(alone, np.tile(np.eye(2) / np.sqrt(1 + 1e-3), (3, 1, 1)), rtol=1e-4)
        assert np.abs(mixed - alone).max() > 0.1

    def test_functional_weights_under_a_gradient(self):
        """A program would read the model's own variables, where the weights are given."""
        m = model()
        fun, weights = kg.functionalize(m)

        def norm(w):
            return ops.sum(kg.batch_jacobian(lambda x: fun(w, x))(tensor(X)) ** 2)

        gradient = kg.grad(norm)(weights)
        direction = [np.ones(w.shape, "float32") for w in weights]
        h = 1e-2
        ahead, behind = (norm([w + s * h * d for w, d in zip(weights, direction, strict=True)]) for s in (1, -1))
        along = sum(float(ops.sum(g)) for g in gradient)
        np.testing.assert_allclose(along, (float(ahead) - float(behind)) / (2 * h), rtol=2e-2, atol=1e-3)


class TestMemory:
    @pytest.mark.parametrize("make", [lambda m: m, lambda m: lambda x: m(x)], ids=["model", "closure"])
    def test_a_model_is_let_go(self, make):
        def use():
            m = model()
            fun = make(m)
            for _ in range(2):
                kg.batch_jacobian(fun)(X)
                kg.jacobian(fun, chunk_size=2)(X)
                kg.hessian(lambda x: ops.sum(m(x)))(X)
            return weakref.ref(m)

        reference = use()
        keras.backend.clear_session()
        gc.collect()
        assert reference() is None

    def test_a_method(self):
        class Physics:
            def __init__(self):
                self.calls = 0

            def energy(self, x):
                self.calls += 1
                return ops.sum(x**3)

        p = Physics()
        for _ in range(2):
            close(kg.hessian(p.energy)(tensor([1.0])), [[6.0]])
        calls = p.calls
        close(kg.hessian(p.energy)(tensor([2.0])), [[12.0]])
        assert p.calls == calls
        reference = weakref.ref(p)
        del p
        gc.collect()
        assert reference() is None


class TestFallback:
    def test_python_that_depends_on_values(self):
        def fun(x):
            return x * x if float(ops.convert_to_numpy(ops.sum(x))) > 0 else 5 * x

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                close(kg.jacobian(fun)(tensor([1.0])), [[2.0]])
            close(kg.jacobian(fun)(tensor([-1.0])), [[5.0]])
        assert len([w for w in caught if "runs fun eagerly" in str(w.message)]) == 1

    @pytest.mark.parametrize("transform", [kg.jit, kg.jacobian, kg.batch_jacobian], ids=lambda t: t.__name__)
    @pytest.mark.parametrize("error", [MemoryError, ValueError, KeyboardInterrupt, RuntimeError, AttributeError])
    def test_one_failure_is_raised_and_the_next_call_compiles(self, transform, error):
        calls, failures = [], [error("once")]

        def fun(x):
            calls.append(1)
            if failures:
                raise failures.pop()
            return x * x

        compiled = transform(fun)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(error, match="once"):
                compiled(tensor(X))
            compiled_by(lambda: compiled(tensor(X)))
            traced = len(calls)
            close(ops.sum(compiled(tensor(X))), np.sum(X**2) if transform is kg.jit else np.sum(2 * X))
        assert not [w for w in caught if "eagerly" in str(w.message)]
        assert len(calls) == traced

    @pytest.mark.parametrize(
        "value",
        [
            lambda x: float(ops.sum(x)),
            lambda x: int(ops.sum(x)),
            lambda x: bool(ops.sum(x) > 0),
            lambda x: np.sum(np.asarray(x.detach() if hasattr(x, "detach") else x)),
            lambda x: ops.convert_to_numpy(x).sum(),
            lambda x: len([i for i in range(5) if i < ops.sum(x)]),
            lambda x: [1, 2, 3][ops.cast(ops.sum(x) / 30, "int32")],
        ],
        ids=["float", "int", "bool", "asarray", "convert_to_numpy", "comparison", "index"],
    )
    def test_what_asks_for_a_value_runs_eagerly(self, value, backend):
        def fun(x):
            return x * x * (1 if value(x) else 2)

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                close(kg.batch_jacobian(fun)(tensor(X)), np.stack([np.diag(2 * x) for x in X]))
        found = [str(w.message) for w in caught if "because its Python code depends on the values" in str(w.message)]
        assert len(found) == (0 if backend == "torch" else 1)

    def test_an_error_of_the_function_itself_is_raised(self):
        def fun(x):
            raise KeyError("mine")

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(KeyError, match="mine"):
                kg.jacobian(fun)(tensor([1.0]))

    def test_an_unhashable_constant(self):
        fun = kg.jacobian(lambda x, mask: x * ops.convert_to_tensor(list(mask)))
        close(fun(tensor([1.0, 1.0]), mask={1.0}), np.eye(2))


def test_a_compiled_function_after_a_layer_that_is_built_within_the_transform():
    layer = keras.layers.BatchNormalization(epsilon=0.0)  # whose statistics begin as 0 and 1
    double = kg.jit(lambda x: 2.0 * x**2)

    gradient = kg.grad(lambda x: ops.sum(double(layer(x, training=False))))(tensor([[1.0, -3.0]]))

    close(gradient, [[4.0, -12.0]])
    close(layer(tensor([[1.0, -3.0]])), [[1.0, -3.0]])
