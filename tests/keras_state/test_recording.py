"""The read hook: that it sees every read of every variable, once, on its own thread."""

import threading

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.keras_internals.variables import Variable
from keras_gradtools.keras_state import recording
from tests.cases import close, tensor


def variable(x, trainable=True):
    return keras.Variable(np.asarray(x, "float32"), trainable=trainable)


def same_variables(actual, desired):
    """By identity and without regard to order: to compare variables with == would read them."""
    assert sorted(map(id, actual)) == sorted(map(id, desired))


READS = {
    "value": lambda v: v.value,
    "operator": lambda v: v * 2.0,
    "reflected operator": lambda v: 2.0 - v,
    "matmul": lambda v: tensor(np.ones((2, 2))) @ v[:, None],
    "index": lambda v: v[0],
    "negation": lambda v: -v,
    "ops": lambda v: ops.sin(v),
    "ops beside a tensor": lambda v: ops.add(tensor([1.0, 1.0]), v),
    "ops in a list": lambda v: ops.stack([tensor([1.0, 1.0]), v]),
    "copy": ops.copy,
    "assign_add": lambda v: v.assign_add([1.0, 1.0]),
}


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_every_way_to_read(read, trainable):
    v = variable([1.0, 2.0], trainable)
    with recording.ReadLog() as log:
        read(v)
        read(v)
    same_variables(log.variables, [v])


class Everything(keras.Model):
    """Layers of many kinds, and a weight of its own that is read in `call`."""

    def __init__(self):
        super().__init__()
        self.embed = layers.Embedding(5, 4)
        self.attention = layers.MultiHeadAttention(1, 2)
        self.conv = layers.Conv1D(4, 2, data_format="channels_last")
        self.norm = layers.BatchNormalization()
        self.recurrent = layers.GRU(3)
        self.frozen = layers.Dense(3)
        self.frozen.trainable = False
        self.head = layers.Dense(1)
        self.scale = self.add_weight(shape=(), initializer="ones")

    def call(self, x, training=False):
        x = self.embed(x)
        x = self.norm(self.conv(self.attention(x, x)), training=training)
        return self.head(self.frozen(self.recurrent(x))) * self.scale


TOKENS, TARGETS = np.arange(24).reshape(4, 6) % 5, np.ones((4, 1))


def built():
    model = Everything()
    model(TOKENS)
    return model


@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.fast_on("torch")), True])
def test_a_model_shows_every_trainable_variable(training):
    model = built()
    assert len(model.trainable_variables) == 19
    with kg.GradientTape() as tape:
        y = model(ops.convert_to_tensor(TOKENS), training=training)
    same_variables(tape.watched_variables(), model.trainable_variables)
    # Each was not only seen, but is connected with what was computed from it.
    assert all(g is not None for g in tape.gradient(y, model.trainable_variables))


class Penalized(keras.Model):
    """Opens a tape inside `fit`, where Keras lends JAX the values of its variables."""

    def __init__(self, report):
        super().__init__()
        self.inner, self.report = built(), report

    def call(self, x, training=False):
        return self.inner(x, training=training)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        with recording.ReadLog() as log, kg.GradientTape() as tape:
            loss = ops.mean(ops.square(self.inner(x, training=training) - y))
        gradients = tape.gradient(loss, self.inner.trainable_variables)
        self.report(tape.watched_variables(), log.variables, gradients)
        return loss + sum(ops.sum(ops.square(g)) for g in gradients)


def test_a_step_of_fit_shows_every_variable():
    reports = []
    model = Penalized(lambda *report: reports.append(report))
    model.compile("sgd")
    model.fit(TOKENS, TARGETS, batch_size=2, verbose=0)
    watched, read, gradients = reports[0]
    same_variables(watched, model.inner.trainable_variables)
    assert {id(v) for v in model.inner.variables if "seed" not in v.path} <= set(map(id, read))
    assert all(g is not None for g in gradients)
    assert all(np.isfinite(w).all() for w in model.get_weights())


class TestHook:
    def test_is_installed_once(self):
        # The wrapper stands directly on Keras' own method.
        hook = Variable._maybe_autocast
        inner = dict(zip(hook.__code__.co_freevars, hook.__closure__, strict=True))["autocast_only"].cell_contents
        assert inner.__module__ == "keras.src.backend.common.variables"

    def test_each_read_is_noted_once(self):
        seen = []
        v = variable(3.0)
        with kg.GradientTape() as tape:
            inner = tape._tape
            note = inner.note_read
            inner.note_read = lambda variable, *rest: (seen.append(id(variable)), note(variable, *rest))
            _ = v.value
        assert seen == [id(v)]

    def test_without_a_tape_reads_are_as_ever(self):
        v = variable(3.0)
        close(v.value, 3)
        assert v.value is v._value

    def test_autocast_still_happens(self):
        layer = layers.Dense(2, dtype="mixed_bfloat16")
        layer.build((None, 3))
        with kg.GradientTape():
            y = layer(tensor(np.ones((1, 3))))
        assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
        assert layer.kernel.dtype == "float32"

    def test_tapes_outside_a_pause_are_told(self):
        v = variable(3.0)
        with kg.GradientTape() as outer, kg.GradientTape() as inner, inner.stop_recording():
            _ = v * 1.0
        same_variables(outer.watched_variables(), [v])
        same_variables(inner.watched_variables(), [])


class TestThreads:
    def test_logs_and_tapes_are_those_of_the_thread(self):
        v, w = variable(3.0), variable(2.0)
        seen = []

        def elsewhere():
            with recording.ReadLog() as log:
                _ = w * 1.0
            seen.extend([log.variables, recording.active_tapes()])

        with recording.ReadLog() as log, kg.GradientTape() as tape:
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            _ = v * 1.0
        same_variables(seen[0], [w])
        assert seen[1] == []
        same_variables(log.variables, [v])
        same_variables(tape.watched_variables(), [v])


class TestReadLog:
    def test_lists_in_the_order_of_the_first_read(self):
        a, b = variable(1.0), variable(2.0)
        with recording.ReadLog() as log:
            _ = b * a * b
        assert [id(v) for v in log.variables] == [id(b), id(a)]

    def test_nests(self):
        a, b = variable(1.0), variable(2.0)
        with recording.ReadLog() as outer:
            _ = a * 1.0
            with recording.ReadLog() as inner:
                _ = b * 1.0
        same_variables(outer.variables, [a, b])
        same_variables(inner.variables, [b])

    def test_stops_at_its_end_and_after_an_exception(self):
        v = variable(1.0)
        with pytest.raises(KeyError), recording.ReadLog() as log:
            raise KeyError
        _ = v * 1.0
        assert log.variables == []


def test_active_tapes_are_listed_outermost_first():
    with kg.GradientTape() as outer, kg.GradientTape() as inner:
        assert recording.active_tapes() == [outer._tape, inner._tape]
        with outer.stop_recording():
            assert recording.active_tapes() == [inner._tape]
    assert recording.active_tapes() == []
