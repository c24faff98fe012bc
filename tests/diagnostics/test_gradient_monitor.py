"""`GradientMonitor` in Keras' own loop, against the same numbers by hand, and what it writes for TensorBoard."""

import csv
import itertools
import math
import sys

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.callbacks import GradientMonitor
from tests.event_files import events_of

RNG = np.random.default_rng(23)
X = RNG.normal(size=(24, 5)).astype("float32")
Y = RNG.normal(size=(24, 3)).astype("float32")
DATA = (X[:12], Y[:12])
RATE = 0.05
SUMMARIES = {"gradient_norm", "dead_units", "update_to_weight_ratio", "gradient_noise_scale"}


def compiled(*more, rate=RATE, **options):
    parts = [layers.Dense(8, "relu", name="hidden"), *more, layers.Dense(3, name="out")]
    model = keras.Sequential([keras.Input((5,)), *parts])
    draw = np.random.default_rng(1)
    model.set_weights([draw.normal(size=w.shape) for w in model.get_weights()])
    bias = model.get_layer("hidden").bias
    # Two units that no input of these brings above zero.
    bias.assign(np.where(np.arange(8) < 2, -100.0, ops.convert_to_numpy(bias)))
    model.compile(keras.optimizers.SGD(rate), "mse", **options)
    return model


def fitted(monitor, model=None, **options):
    model = compiled() if model is None else model
    options = {"batch_size": 8, "epochs": 3, "shuffle": False, "verbose": 0, **options}
    return model.fit(X, Y, callbacks=monitor if isinstance(monitor, list) else [monitor], **options).history


def norm(arrays):
    return math.sqrt(sum(float((np.asarray(a, "float64") ** 2).sum()) for a in arrays))


class ByHand:
    """The numbers after each epoch of the same training, by steps written out."""

    def __init__(self, epochs=3, size=8):
        self.model = compiled()
        self.rows = [self.epoch(size) for _ in range(epochs)]

    def gradient(self, x, y):
        with kg.GradientTape() as tape:
            loss = keras.losses.MeanSquaredError()(y, self.model(x))
        return [ops.convert_to_numpy(g) for g in tape.gradient(loss, self.model.trainable_variables)]

    def epoch(self, size):
        for start in range(0, len(X), size):
            before = [w.copy() for w in self.model.get_weights()]
            step = [-RATE * g for g in self.gradient(X[start : start + size], Y[start : start + size])]
            self.model.set_weights([w + d for w, d in zip(before, step, strict=True)])
        gradient = self.gradient(*DATA)
        each = [self.gradient(x[None], y[None]) for x, y in zip(*DATA, strict=True)]
        rows = np.stack([np.concatenate([g.ravel() for g in gradients]) for gradients in each]).astype("float64")
        trace = rows.var(axis=0, ddof=1).sum()
        squared = (rows.mean(axis=0) ** 2).sum() - trace / len(rows)
        kernel, bias = self.model.get_layer("hidden").get_weights()
        dead = ((DATA[0] @ kernel + bias) <= 0).all(axis=0)
        return {
            "gradient_norm": norm(gradient),
            "gradient_norm/hidden": norm(gradient[:2]),
            "gradient_norm/out": norm(gradient[2:]),
            "dead_units": dead.mean(),
            "dead_units/hidden": dead.mean(),
            "update_to_weight_ratio": norm(step) / norm(before),
            "update_to_weight_ratio/hidden": norm(step[:2]) / norm(before[:2]),
            "update_to_weight_ratio/out": norm(step[2:]) / norm(before[2:]),
            "gradient_noise_scale": trace / squared if squared > 0 else math.inf,
        }


def test_values_are_those_by_hand(tmp_path):
    monitor, log = GradientMonitor(DATA), tmp_path / "log.csv"
    model = compiled()
    callbacks = [monitor, keras.callbacks.CSVLogger(log)]
    history = model.fit(X, Y, batch_size=8, epochs=3, shuffle=False, verbose=0, callbacks=callbacks).history
    rows = ByHand().rows
    assert {name for name in history if name.split("/")[0] in SUMMARIES} == set(rows[0])
    for epoch, row in enumerate(rows):
        for name, value in row.items():
            assert history[name][epoch] == pytest.approx(value, rel=1e-3), (name, epoch)
    assert history["dead_units"][0] >= 0.25
    with open(log) as file:
        written = list(csv.DictReader(file))
    assert [float(row["gradient_norm/out"]) for row in written] == pytest.approx(history["gradient_norm/out"])
    assert monitor.layers["gradient_norm"] == {name: history[f"gradient_norm/{name}"] for name in ("hidden", "out")}
    assert monitor.layers["dead_units"] == {"hidden": history["dead_units/hidden"]}
    assert monitor.last == {name: history[name][-1] for name in rows[0]}


def test_every_batch():
    monitor = GradientMonitor(DATA, every=1)
    history = fitted(monitor)
    by_hand = ByHand()
    # Three batches in each epoch; the logs of the epoch have the last of them.
    values = monitor.layers["update_to_weight_ratio"]["hidden"]
    assert len(values) == 9 and all(math.isfinite(v) for v in values)
    for epoch, row in enumerate(by_hand.rows):
        assert values[3 * epoch + 2] == pytest.approx(row["update_to_weight_ratio/hidden"], rel=1e-3)
        assert history["gradient_norm"][epoch] == pytest.approx(row["gradient_norm"], rel=1e-3)


def test_every_second_batch():
    monitor = GradientMonitor(DATA, every=2, quantities=("update_to_weight_ratio",))
    fitted(monitor)
    every = GradientMonitor(DATA, every=1, quantities="update_to_weight_ratio")
    fitted(every)
    assert monitor.layers["update_to_weight_ratio"]["out"] == pytest.approx(
        every.layers["update_to_weight_ratio"]["out"][1::2]
    )


def test_every_second_epoch():
    monitor = GradientMonitor(DATA, every="2 epochs")
    history = fitted(monitor, epochs=5)
    rows = ByHand(epochs=4).rows
    for name in ("gradient_norm", "update_to_weight_ratio/out"):
        assert history[name] == pytest.approx([rows[1][name], rows[3][name]], rel=1e-3), name


@pytest.mark.usefixtures("needs_steps_per_execution")
@pytest.mark.parametrize("every", [2, 3])
def test_steps_of_several_batches(every):
    # Steps end after 2, 3; 5, 6; 8, 9 batches. Keras 3.10 tells hooks 1, 3; 4, 6; 7, 9.
    monitor = GradientMonitor(DATA, every=every, quantities="update_to_weight_ratio")
    fitted(monitor, compiled(steps_per_execution=2))
    each = GradientMonitor(DATA, every=1, quantities="update_to_weight_ratio")
    ends: list = []
    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: ends.append(batch + 1))
    fitted([each, note], compiled(steps_per_execution=2))
    counts = [0, *(3 * (i // 2) + min(end, 3) for i, end in enumerate(ends))]
    of_each = each.layers["update_to_weight_ratio"]["out"]
    chosen = [i for i, (a, b) in enumerate(itertools.pairwise(counts)) if b // every > a // every]
    assert monitor.layers["update_to_weight_ratio"]["out"] == pytest.approx([of_each[i] for i in chosen])


@pytest.mark.usefixtures("needs_steps_per_execution")
def test_the_last_step_of_several_in_one_program():
    model = compiled(steps_per_execution=2)
    # Of three steps the last is by itself.
    history = fitted(GradientMonitor(DATA), model)
    expected = [row["update_to_weight_ratio"] for row in ByHand().rows]
    assert history["update_to_weight_ratio"] == pytest.approx(expected, rel=1e-3)


def test_a_generator_with_steps():
    def batches():
        while True:
            for start in range(0, len(X), 8):
                yield X[start : start + 8], Y[start : start + 8]

    rows = [row["update_to_weight_ratio"] for row in ByHand().rows]
    monitor = GradientMonitor(DATA, quantities="update_to_weight_ratio")
    known = compiled().fit(batches(), steps_per_epoch=3, epochs=3, verbose=0, callbacks=[monitor]).history
    assert known["update_to_weight_ratio"] == pytest.approx(rows, rel=1e-3)


def test_an_epoch_of_unknown_length_has_no_last_step():
    batches = ((X[start : start + 8], Y[start : start + 8]) for start in range(0, len(X), 8))
    monitor = GradientMonitor(DATA, quantities="update_to_weight_ratio")
    history = compiled().fit(batches, epochs=1, verbose=0, callbacks=[monitor]).history
    assert math.isnan(history["update_to_weight_ratio"][0])


def test_only_some_quantities_and_no_layers():
    monitor = GradientMonitor(DATA, quantities=("gradient_norm", "dead_units"), per_layer=False)
    history = fitted(monitor)
    assert {name for name in history if name.split("/")[0] in SUMMARIES} == {"gradient_norm", "dead_units"}
    assert list(monitor.layers["gradient_norm"]) == ["hidden", "out"]


def test_variables_of_one_layer_and_another_loss():
    model = compiled()
    head = model.get_layer("out")
    monitor = GradientMonitor(DATA, quantities="gradient_norm", variables=head, loss="mae")
    history = fitted(monitor, model, epochs=1)
    operator = kg.curvature.Hessian(model, "mae", DATA, head)
    assert history["gradient_norm"] == pytest.approx([norm([operator.gradient()])], rel=1e-4)
    assert list(monitor.layers["gradient_norm"]) == ["out"]


def test_no_relu_no_dead_units():
    model = keras.Sequential([keras.Input((5,)), layers.Dense(4, "tanh"), layers.Dense(3)])
    model.compile("sgd", "mse")
    history = fitted(GradientMonitor(DATA), model)
    assert "dead_units" not in history and "gradient_norm" in history


def test_layers_of_nested_models_have_their_paths():
    inner = keras.Sequential([keras.Input((5,)), layers.Dense(5, "relu", name="dense")], name="block")
    model = keras.Sequential([keras.Input((5,)), inner, layers.Dense(3, name="dense")])
    model.compile("sgd", "mse")
    monitor = GradientMonitor(DATA)
    fitted(monitor, model, epochs=1)
    assert list(monitor.layers["gradient_norm"]) == ["block/dense", "dense"]
    assert list(monitor.layers["dead_units"]) == ["block/dense"]


@pytest.mark.parametrize("every", ["epoch", 1])
def test_nothing_changes(every):
    # Not by rounding: the same program trains both.
    alone, watched = (compiled(layers.BatchNormalization(), layers.Dropout(0.3, seed=1)) for _ in range(2))
    alone.fit(X, Y, batch_size=8, epochs=2, verbose=0, shuffle=False)
    fitted(GradientMonitor(DATA, every=every, training=True), watched, epochs=2)
    for a, b in zip(alone.get_weights(), watched.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(alone.variables, watched.variables, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))


class Counted(layers.Layer):
    """Counts how often Python calls it."""

    calls = 0

    def call(self, x):
        Counted.calls += 1
        return x


def test_the_gradients_are_traced_once(backend):
    monitor = GradientMonitor(DATA, quantities=("gradient_norm", "update_to_weight_ratio", "gradient_noise_scale"))
    counts = []

    class Count(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            counts.append(Counted.calls)

    compiled(Counted()).fit(X, Y, epochs=4, verbose=0, callbacks=[monitor, Count()])
    # On torch, `fit` itself runs Python once for each of its batches.
    assert counts[-1] - counts[-2] == (1 if backend == "torch" else 0)


def test_a_wrapped_model():
    alone, model = compiled(), compiled()
    wrapped = kg.models.InputGradientRegularized(model, 0.0)
    wrapped.compile(keras.optimizers.SGD(RATE), "mse")
    found, expected = fitted(GradientMonitor(DATA), wrapped), fitted(GradientMonitor(DATA), alone)
    for name in expected:
        if name.split("/")[0] in SUMMARIES:
            assert found[name] == pytest.approx(expected[name], rel=1e-3), name


def test_callbacks_act_on_it():
    stop = keras.callbacks.EarlyStopping("gradient_norm", mode="max", patience=0)
    model = compiled(rate=1e-3)
    history = model.fit(X, Y, epochs=10, verbose=0, callbacks=[GradientMonitor((X, Y)), stop]).history
    assert len(history["loss"]) < 10


def test_a_gradient_that_is_not_finite():
    x = X[:12].copy()
    x[0, 0] = np.inf
    history = fitted(GradientMonitor((x, Y[:12])), epochs=1)
    assert all(math.isnan(history[name][0]) for name in ("gradient_norm", "gradient_noise_scale"))


def test_weights_of_zero_that_move():
    model = keras.Sequential([keras.Input((5,)), layers.Dense(3, kernel_initializer="zeros", name="out")])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    history = model.fit(X, Y, batch_size=24, epochs=1, verbose=0, callbacks=[GradientMonitor(DATA)]).history
    assert history["update_to_weight_ratio"] == [math.inf]


# --- TensorBoard ---


@pytest.mark.parametrize(("every", "steps"), [("epoch", [0, 1, 2]), (2, [2, 4, 6, 8])])
def test_scalars_and_histograms(tmp_path, every, steps):
    monitor = GradientMonitor(DATA, every, per_layer=False, log_dir=tmp_path)
    fitted(monitor)
    scalars, histograms = {}, {}
    for event in events_of(tmp_path):
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
            else:
                histograms.setdefault(value.tag, []).append((event.step, value.histo))
    # All layers, whatever the logs have.
    assert set(scalars) == set(monitor.last)
    assert [step for step, _ in scalars["gradient_norm"]] == steps
    assert [v for _, v in scalars["gradient_norm/out"]] == pytest.approx(monitor.layers["gradient_norm"]["out"])
    assert {tag.split("/", 1)[0] for tag in histograms} == {"gradients"} and len(histograms) == 4
    kernel = next(found for tag, found in histograms.items() if tag.endswith("out/kernel"))
    assert [step for step, _ in kernel] == steps and all(h.num == 24 for _, h in kernel)
    (bias,) = [found for tag, found in histograms.items() if tag.endswith("out/bias")]
    squares = [kernel[i][1].sum_squares + bias[i][1].sum_squares for i in range(len(steps))]
    assert np.sqrt(squares) == pytest.approx(monitor.layers["gradient_norm"]["out"], rel=1e-4)


def test_numbers_that_are_not_finite_are_left_out(tmp_path, capfd):
    x = X[:12].copy()
    x[0, 0] = np.inf
    fitted(GradientMonitor((x, Y[:12]), quantities=("dead_units", "gradient_norm"), log_dir=str(tmp_path)), epochs=1)
    tags = {value.tag for event in events_of(tmp_path) for value in event.summary.value}
    assert "dead_units" in tags and "gradient_norm" not in tags
    assert "NaN or Inf" not in "".join(capfd.readouterr())


def test_without_tensorboardx(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"GradientMonitor writes to `log_dir` .*keras-gradtools\[tensorboard\]"):
        fitted(GradientMonitor(DATA, log_dir=tmp_path))


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "as `every`"),
        ({"quantities": ()}, "as `quantities`"),
        ({"quantities": ("gradient",)}, "some of gradient_norm, dead_units, .*Received: quantities="),
        ({"per_layer": 1}, "as `per_layer`"),
        ({"log_dir": 3}, "a path as `log_dir`"),
    ],
    ids=["every", "none", "unknown", "per_layer", "log_dir"],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=f"GradientMonitor expects .*{message}"):
        GradientMonitor(DATA, **options)


def test_data_that_do_not_fit():
    with pytest.raises(ValueError, match="as `data`. Received: data="):
        fitted(GradientMonitor((X,)))
