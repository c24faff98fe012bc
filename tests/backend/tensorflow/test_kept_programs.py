"""Jacobians of eager tapes by programs that are kept: they are used, and whatever differs from before is seen."""

import gc
import threading
import weakref

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools import backend
from tests.cases import close, tensor

if keras.config.backend() != "tensorflow":
    pytest.skip("only TensorFlow keeps programs of its tapes", allow_module_level=True)

import tensorflow as tf

from keras_gradtools.backend.tensorflow import backward_passes, kept_programs, vectorize

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(5, 4)).astype("float32")


@pytest.fixture(autouse=True)
def no_programs():
    kept_programs._programs.clear()
    yield
    kept_programs._programs.clear()


@pytest.fixture
def uses(monkeypatch):
    """Whether each Jacobian came from a kept program."""
    found, run, usual = [], kept_programs._Program.__call__, backend.kept

    def noted(self, arguments):
        found.append(True)
        return run(self, arguments)

    def kept(*args):
        before = len(found)
        result = usual(*args)
        # The check of a new program runs it, too, beside the usual way.
        found[before:] = [len(found) > before and checks[-1:] != [len(found)]]
        return result

    checks, checked = [], kept_programs._checked

    def noted_check(*args):
        program = checked(*args)
        checks.append(len(found))
        return program

    monkeypatch.setattr(kept_programs._Program, "__call__", noted)
    monkeypatch.setattr(kept_programs, "_checked", noted_check)
    monkeypatch.setattr(backend, "kept", kept, raising=False)
    return found


def jacobians(block, *sources, method="jacobian"):
    """The Jacobians of `block()` by the sources: ours, and by one native gradient for each element."""
    with kg.GradientTape() as tape:
        tape.watch(sources)
        y = block()
    ours = getattr(tape, method)(y, list(sources), unconnected_gradients="zero")
    with tf.GradientTape(persistent=True) as native:
        native.watch([s._value if isinstance(s, keras.Variable) else s for s in sources])
        flat = tf.reshape(block(), [-1])
        elements = tf.unstack(flat)
    values = [s._value if isinstance(s, keras.Variable) else s for s in sources]
    rows = [native.gradient(e, values, unconnected_gradients="zero") for e in elements]
    theirs = [np.stack([np.asarray(tf.convert_to_tensor(r)) for r in column]) for column in zip(*rows, strict=True)]
    shaped = [t.reshape(*y.shape, *s.shape) for t, s in zip(theirs, sources, strict=True)]
    if method == "batch_jacobian":
        shaped = [np.stack([whole[(i, ...)].take(i, axis=len(y.shape) - 1) for i in range(len(y))]) for whole in shaped]
    return ours, shaped


def check(block, *sources, method="jacobian", times=3):
    for _ in range(times):
        ours, theirs = jacobians(block, *sources, method=method)
        for a, b in zip(ours, theirs, strict=True):
            close(a, b, rtol=1e-4, atol=1e-5)


def mlp(activation="tanh"):
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((4,)), layers.Dense(6, activation), layers.Dense(3)])


class TestUsed:
    def test_from_the_third_call_on(self, uses):
        model, x = mlp(), tensor(X)
        check(lambda: model(x), x, method="batch_jacobian", times=5)
        assert uses == [False, False, True, True, True]

    def test_it_neither_traces_nor_runs_the_backward_pass(self, monkeypatch):
        model, x = mlp(), tensor(X)
        check(lambda: model(x), x, times=2)
        monkeypatch.setattr(vectorize, "vectorize", None)
        monkeypatch.setattr(backward_passes, "_gradient_function", None)
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = model(x)
        assert tape.jacobian(y, x, unconnected_gradients="zero").shape == (5, 3, 5, 4)

    def test_by_variables(self, uses):
        model, x = mlp(), tensor(X)
        check(lambda: model(x), model.layers[0].kernel, x, model.layers[1].bias)
        assert uses == [False, False, True]

    def test_unconnected_sources(self, uses):
        x, other = tensor(X), tensor([1.0])
        for _ in range(4):
            with kg.GradientTape() as tape:
                tape.watch([x, other])
                y = x * 2.0
            by_x, by_other = tape.jacobian(y, [x, other])
            assert by_other is None
            close(ops.sum(by_x), 2.0 * X.size)
        assert uses == [False, False, True, True]

    def test_another_program_for_zeros_and_for_another_order_of_sources(self, uses):
        a, b = tensor([1.0, 2.0]), tensor([3.0, 4.0])
        for sources in ([a, b], [b, a], [a, a], [b]):
            check(lambda: a * ops.sin(b), *sources)
        assert sum(uses) == 4


def attention():
    x = keras.Input((3, 4))
    y = layers.MultiHeadAttention(2, 2)(x, x)
    return keras.Model(x, layers.Dense(2)(layers.LayerNormalization()(x + y)))


MODELS = {
    **{name: lambda name=name: mlp(name) for name in ("relu", "gelu", "silu", "softmax", "elu", "selu", "softplus")},
    "leaky relu": lambda: mlp(lambda x: ops.leaky_relu(x, 0.3)),
    "log softmax": lambda: mlp(ops.log_softmax),
    "convolutions": lambda: keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(3, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(3),
        ]
    ),
    "GRU": lambda: keras.Sequential([keras.Input((3, 2)), layers.GRU(3), layers.Dense(2)]),
    "LSTM": lambda: keras.Sequential([keras.Input((3, 2)), layers.LSTM(3, return_sequences=True)]),
    "bidirectional": lambda: keras.Sequential([keras.Input((3, 2)), layers.Bidirectional(layers.SimpleRNN(2))]),
    "attention": attention,
}


@pytest.mark.parametrize("method", ["jacobian", "batch_jacobian"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_models(make, method, uses):
    keras.utils.set_random_seed(0)
    model = make()
    for _ in range(3):
        x = tensor(RANDOM.normal(size=(2, *model.input_shape[1:])))
        check(lambda x=x: model(x), x, method=method, times=1)
    # TensorFlow's `silu` has a custom gradient, which is a function of Python.
    assert uses[-1] == (make is not MODELS["silu"])


class TestSeen:
    """Each block differs from the one before, after the program has been used."""

    def alternately(self, block, values, *sources):
        for value in (*values, *values, *values, *values):
            check(lambda value=value: block(value), *sources, times=1)

    def test_python_numbers(self, uses):
        x = tensor(X)
        self.alternately(lambda c: ops.tanh(c * x) + c, [0.5, 2.0, -1.0], x)
        assert uses[-1]

    def test_captured_tensors_and_arrays(self, uses):
        x = tensor(X)
        self.alternately(lambda c: c * x * x, [tensor(X + 1.0), X - 1.0], x)
        assert uses[-1]

    def test_branches_on_values(self, uses):
        x = tensor(X)
        self.alternately(lambda c: ops.sin(x) if c > 0 else ops.cos(x) * x, [1.0, -1.0], x)
        assert uses[-2:] == [True, True]

    def test_branches_with_the_same_operations(self, uses):
        a, b = tensor([1.0, 2.0]), tensor([3.0, 5.0])
        self.alternately(lambda c: (a * b) * (a if c else b), [True, False], a, b)
        assert uses[-2:] == [True, True]

    def test_the_number_of_repetitions(self):
        x = tensor([0.1, 0.2])

        def block(n):
            y = x
            for _ in range(n):
                y = ops.sin(y) * 2.0
            return y

        self.alternately(block, [1, 2, 3], x)

    @pytest.mark.parametrize(
        "block, values",
        [
            (lambda x, c: ops.leaky_relu(x, c), [0.1, 0.4]),
            (lambda x, c: ops.sum(x, axis=c), [0, 1]),
            (lambda x, c: ops.max(x, axis=c), [0, 1]),
            (lambda x, c: ops.transpose(ops.reshape(x, (2, 2, 5)), c), [(0, 1, 2), (1, 0, 2), (2, 0, 1)]),
            (lambda x, c: x[c : c + 2], [0, 1, 3]),
            (lambda x, c: ops.roll(x, c, axis=1), [1, 2]),
            (lambda x, c: ops.pad(x, ((c, 0), (0, 1))), [0, 1]),
            (lambda x, c: ops.reshape(x, c), [(4, 5), (5, 4), (20,)]),
            (lambda x, c: ops.take(x, c, axis=0), [np.array([0, 2]), np.array([4, 4])]),
            (lambda x, c: ops.take(x, c, axis=0), [np.arange(20) % 5, np.arange(20) % 3]),
            (lambda x, c: ops.concatenate([x, x[:c]], axis=0), [1, 2]),
            (lambda x, c: ops.cumsum(x, axis=c), [0, 1]),
            (lambda x, c: ops.clip(x, -c, c), [0.1, 0.7]),
            (lambda x, c: ops.where(c > 0, x, 2.0 * x), [X, -X]),
            (lambda x, c: ops.matmul(x, c), [X.T, -2 * X.T]),
            (lambda x, c: ops.top_k(x, c, sorted=True)[0], [1, 3]),
            (lambda x, c: ops.cast(ops.cast(x, c), "float32") * x, ["float64", "float32"]),
            (lambda x, c: ops.floor(x * c) * x, [1.0, 5.0]),
            (lambda x, c: ops.stop_gradient(x * c) * x, [1.0, 5.0]),
            (lambda x, c: ops.unstack(x * c, axis=1)[2], [1.0, 5.0]),
        ],
    )
    def test_arguments_of_operations(self, block, values):
        x = tensor(X)
        self.alternately(lambda c: block(x, c), values, x)

    def test_shapes_and_dtypes(self):
        for _ in range(3):
            for x in (tensor(X), tensor(X[:2]), tensor(X[:, :1]), tensor(X, "float64"), tensor(X[0])):
                check(lambda x=x: ops.tanh(x) * x, x, times=1)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
    def test_a_program_in_each_precision(self, dtype, uses):
        for i in range(4):
            x = tensor([1.0 + i, 2.0], dtype)
            with kg.GradientTape() as tape:
                tape.watch(x)
                y = x * x
            close(ops.cast(tape.jacobian(y, x), "float32"), np.diag([2.0 + 2.0 * i, 4.0]))
        assert uses == [False, False, True, True]

    def test_weights(self, uses):
        model, x = mlp(), tensor(X)
        for i in range(5):
            model.layers[0].kernel.assign(0.1 * i * np.ones((4, 6)))
            check(lambda: model(x), x, model.layers[1].kernel, times=1)
        assert uses[-1]

    def test_a_variable_that_is_assigned_inside(self, uses):
        v = keras.Variable([1.0, 2.0])
        for i in range(5):
            v.assign([1.0 + i, 2.0])
            with kg.GradientTape() as tape:
                y = v * v
                v.assign(3.0 * v)
                y = y + v * 1.0
            # The gradient of a variable sums what was read before and after.
            close(tape.jacobian(y, v), np.diag([2 * (1.0 + i) + 1.0, 5.0]))
        assert uses[-1]

    def test_random_draws(self, uses):
        x, seeds = tensor(X), keras.random.SeedGenerator(0)
        found = []
        for _ in range(6):
            with kg.GradientTape() as tape:
                tape.watch(x)
                factor = keras.random.normal(X.shape, seed=seeds)
                y = factor * x * x
            found.append(tape.batch_jacobian(y, x))
            close(found[-1], [np.diag(row) for row in 2 * ops.convert_to_numpy(factor) * X])
        assert uses[-1] and len({float(j[0, 0, 0]) for j in found}) == 6

    def test_dropout(self, uses):
        x, dropout = tensor(np.ones((5, 4))), layers.Dropout(0.5, seed=1)
        for _ in range(6):
            with kg.GradientTape() as tape:
                tape.watch(x)
                y = dropout(x, training=True)
            close(tape.batch_jacobian(y, x), [np.diag(row) for row in ops.convert_to_numpy(y)])
        assert uses[-1]

    def test_statistics_of_batch_normalization(self, uses):
        layer, x = layers.BatchNormalization(), tensor(X)
        layer.build(X.shape)
        for i in range(5):
            layer.moving_mean.assign(i * np.ones(4))
            layer.moving_variance.assign((1.0 + i) * np.ones(4))
            check(lambda: layer(x) ** 2, x, times=1)
            check(lambda: layer(x, training=True), x, times=1)
        assert uses[-2:] == [True, True]

    def test_a_layer_that_is_frozen(self):
        model, x = mlp(), tensor(X)
        kernel = model.layers[0].kernel
        for trainable in [True] * 3 + [False] * 3 + [True]:
            model.layers[0].trainable = trainable
            with kg.GradientTape() as tape:
                y = model(x)
            assert (tape.jacobian(y, kernel) is not None) == trainable

    def test_masks(self):
        x = tensor(X)
        for mask in 3 * [[True, False, True, True], [False, True, True, False]]:
            check(lambda mask=mask: ops.where(np.array(mask), x, 0.0) * x, x, times=1)


class TestTheBlock:
    """What the tape records, and when it is told to."""

    @pytest.mark.parametrize("times", [1, 2, 3, 4])
    def test_watched_late(self, times):
        x = tensor([1.0, 2.0])
        for _ in range(times):
            with kg.GradientTape() as tape:
                early = x * x
                tape.watch(x)
                y = early * x
            close(tape.jacobian(y, x), np.diag([1.0, 4.0]))

    @pytest.mark.parametrize("times", [1, 2, 3, 4])
    def test_stopped_and_reset(self, times):
        x = tensor([1.0, 2.0])
        for _ in range(times):
            with kg.GradientTape() as tape:
                tape.watch(x)
                y = x * x
                with tape.stop_recording():
                    z = x * x
                y = y * z
            close(tape.jacobian(y, x), np.diag([2.0, 16.0]))
            with kg.GradientTape() as tape:
                tape.watch(x)
                y = x * x
                tape.reset()
                tape.watch(x)
                y = y * x
            close(tape.jacobian(y, x), np.diag([1.0, 4.0]))

    def test_entered_again(self):
        x = tensor([1.0, 2.0])
        for _ in range(4):
            tape = kg.GradientTape(persistent=True)
            with tape:
                tape.watch(x)
                y = x * x
            close(tape.jacobian(y, x), np.diag([2.0, 4.0]))
            with tape:
                y = y * x
            close(tape.jacobian(y, x), np.diag([3.0, 12.0]))

    def test_a_persistent_tape(self, uses):
        x = tensor([1.0, 2.0])
        with kg.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = x**3
            z = ops.sin(y)
        for _ in range(4):
            close(tape.jacobian(y, x), np.diag([3.0, 12.0]))
            close(tape.jacobian(z, y), np.diag(np.cos([1.0, 8.0])))
            close(tape.gradient(z, x), np.cos([1.0, 8.0]) * [3.0, 12.0])
        assert uses[-2:] == [True, True]

    def test_inside_its_own_block(self):
        x = tensor([1.0, 2.0])
        for _ in range(4):
            with kg.GradientTape(persistent=True) as tape:
                tape.watch(x)
                first = tape.jacobian(x**3, x)
                total = ops.sum(first)
            close(tape.jacobian(total, x), [6.0, 12.0])

    def test_second_and_third_order(self, uses):
        x = tensor([1.0, 2.0])
        for _ in range(4):
            with kg.GradientTape() as outermost:
                outermost.watch(x)
                with kg.GradientTape() as outer:
                    outer.watch(x)
                    with kg.GradientTape() as inner:
                        inner.watch(x)
                        y = ops.sum(x**4) * x
                    first = inner.jacobian(y, x)
                second = outer.jacobian(first, x)
            third = outermost.jacobian(second, x)
        assert uses[-3]
        a, b = 1.0, 2.0
        # y_0 = a^5 + a b^4.
        close(first[0], [5 * a**4 + b**4, 4 * a * b**3])
        close(second[0], [[20 * a**3, 4 * b**3], [4 * b**3, 12 * a * b**2]])
        close(third[0, 1], [[0.0, 12 * b**2], [12 * b**2, 24 * a * b]])

    @pytest.mark.parametrize("outer_tape", [kg.GradientTape, tf.GradientTape])
    def test_an_outer_tape_differentiates_by_everything(self, outer_tape, uses):
        model, x = mlp(), tensor(X)
        weights = model.trainable_variables
        for i in range(4):
            with outer_tape() as outer:
                outer.watch(x)
                with kg.GradientTape(watch_accessed_variables=False) as inner:
                    inner.watch(x)
                    y = model(x)
                norm = ops.sum(inner.batch_jacobian(y, x) ** 2)
            found = outer.gradient(norm, [x, *(w._value if outer_tape is tf.GradientTape else w for w in weights)])
            if i == 0:
                expected = [None if g is None else ops.convert_to_numpy(g) for g in found]
        assert uses[-1]
        for a, b in zip(found, expected, strict=True):
            close(a, b, rtol=1e-4, atol=1e-5)

    def test_inside_a_graph(self):
        model, x = mlp(), tensor(X)
        check(lambda: model(x), x)

        @tf.function
        def inside(x):
            with kg.GradientTape() as tape:
                tape.watch(x)
                y = model(x)
            return tape.jacobian(y, x)

        with kg.GradientTape() as tape:
            tape.watch(x)
            y = model(x)
        close(inside(x), tape.jacobian(y, x))

    def test_in_an_eager_training_step(self, uses):
        class Contractive(keras.Model):
            def __init__(self):
                super().__init__()
                self.dense = layers.Dense(3, "tanh")

            def call(self, x):
                return self.dense(x)

            def train_step(self, data):
                x, y = data
                with kg.GradientTape() as outer:
                    with kg.GradientTape(watch_accessed_variables=False) as inner:
                        inner.watch(x)
                        out = self(x, training=True)
                    loss = ops.mean((out - y) ** 2) + 0.1 * ops.mean(inner.batch_jacobian(out, x) ** 2)
                gradients = outer.gradient(loss, self.trainable_variables)
                self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
                return {"loss": loss}

        def trained(times):
            keras.utils.set_random_seed(3)
            model = Contractive()
            model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
            for _ in range(times):
                kept_programs._programs.clear() if times > 1 else None
                model.fit(X, X[:, :3], batch_size=5, epochs=6 // times, verbose=0, shuffle=False)
            return model.get_weights()

        without = trained(6)
        assert not any(uses)
        for a, b in zip(trained(1), without, strict=True):
            close(a, b)
        assert uses[-1]


class TestNotTakenApart:
    """Gradients that are functions of Python may do anything, so they are computed in the usual way."""

    def test_custom_gradients(self, uses):
        factor = 1.0

        @kg.custom_gradient
        def double(x):
            return 2.0 * x, lambda u: factor * u

        x = tensor([1.0, 2.0])
        for i in range(5):
            factor = float(i)
            with kg.GradientTape() as tape:
                tape.watch(x)
                y = double(x)
            close(tape.jacobian(y, x), factor * np.eye(2))
        assert not any(uses)

    def test_a_custom_gradient_is_called_with_tensors_only(self):
        seen = []

        @tf.custom_gradient
        def double(x):
            def gradient(u):
                seen.append(u)
                return tf.fill((2,), 2.0)

            return 2.0 * x, gradient

        x = tensor([1.0, 2.0])
        for _ in range(4):
            with kg.GradientTape() as tape:
                tape.watch(x)
                y = double(x)
            close(tape.jacobian(y, x), np.full((2, 2), 2.0))
        assert len(seen) == 8 and all(map(tf.is_tensor, seen))

    def test_compiled_functions(self, uses):
        c = keras.Variable(1.0)
        square, x = tf.function(lambda x: c * x * x), tensor([1.0, 2.0])
        for i in range(5):
            c.assign(float(i))
            with kg.GradientTape() as tape:
                tape.watch(x)
                y = square(x) * x
            close(tape.jacobian(y, x), i * np.diag([3.0, 12.0]))
        assert not any(uses)

    def test_an_operation_without_a_gradient(self):
        x = tensor([1.0, 2.0])
        for _ in range(4):
            with kg.GradientTape(persistent=True) as tape:
                tape.watch(x)
                y = tf.raw_ops.DenseBincount(input=[0, 1], size=2, weights=x, binary_output=False)
                z = x * x
            with pytest.raises(LookupError):
                tape.jacobian(y, x)
            # The tape is as before.
            close(tape.jacobian(z, x), np.diag([2.0, 4.0]))
            close(tape.gradient(z, x), [2.0, 4.0])

    def test_a_program_whose_first_result_is_another_is_not_used(self, monkeypatch, uses):
        x = tensor([1.0, 2.0])
        monkeypatch.setattr(backward_passes.Gradients, "compute", lambda self, values, gradients: [gradients[0]] * 2)
        for _ in range(5):
            with kg.GradientTape() as tape:
                tape.watch(x)
                y = x * 3.0
            close(tape.jacobian(y, x), 3.0 * np.eye(2))
        assert not any(uses)


class TestMemory:
    def test_no_tensor_is_kept(self):
        kept = []
        for _ in range(4):
            x = tensor(X)
            with kg.GradientTape() as tape:
                tape.watch(x)
                h = ops.tanh(x)
                y = h * x
            tape.jacobian(y, x)
            kept += [weakref.ref(x), weakref.ref(h), weakref.ref(y)]
            del x, h, y, tape
        gc.collect()
        assert [r() for r in kept] == [None] * len(kept)

    def test_programs_are_bounded(self, monkeypatch):
        monkeypatch.setattr(kept_programs, "MOST_PROGRAMS", 2)
        for n in range(1, 6):
            x = ops.ones((n,))
            check(lambda x=x: x * x, x)
        programs = [p for p in kept_programs._programs._by_key.values() if isinstance(p, kept_programs._Program)]
        assert len(programs) == 2
        for n in range(1, 40):
            x = ops.ones((n,))
            check(lambda x=x: x * x, x, times=1)
        assert len(kept_programs._programs._by_key) <= 8


def test_threads():
    model, errors = mlp(), []

    def work(seed):
        try:
            x = tensor(np.random.default_rng(seed).normal(size=(5, 4)))
            check(lambda: model(x), x, method="batch_jacobian", times=6)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
