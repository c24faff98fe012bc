"""`CurvatureMonitor` in Keras' own loop."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_gradtools.callbacks import CurvatureMonitor
from keras_gradtools.curvature import Hessian

RNG = np.random.default_rng(9)
N, D = 24, 3
X = RNG.normal(size=(N, D)).astype("float32")
T = RNG.normal(size=(N, 1)).astype("float32")
NAMES = {
    "hessian_max_eigenvalue",
    "hessian_min_eigenvalue",
    "hessian_trace",
    "hessian_trace_error",
    "sharpness_times_learning_rate",
    "gradient_norm",
}


def compiled(rate=0.05, hidden=4):
    model = keras.Sequential([keras.Input((D,)), layers.Dense(hidden, "tanh"), layers.Dense(1)])
    draw = np.random.default_rng(1)
    model.set_weights([draw.normal(size=w.shape) for w in model.get_weights()])
    model.compile(keras.optimizers.SGD(rate), "mse")
    return model


class Weights(keras.callbacks.Callback):
    """The weights after each epoch."""

    def on_train_begin(self, logs=None):
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        sync = getattr(self.model, "jax_state_sync", None)
        if sync:
            sync()
        self.seen.append(self.model.get_weights())


def test_values_are_those_of_the_dense_hessian(tmp_path):
    model, weights, log = compiled(), Weights(), tmp_path / "log.csv"
    monitor = CurvatureMonitor((X, T), tol=1e-4, trace_matvecs=100)
    callbacks = [monitor, weights, keras.callbacks.CSVLogger(log)]
    history = model.fit(X, T, batch_size=8, epochs=3, verbose=0, callbacks=callbacks).history
    assert set(history) >= NAMES and set(log.read_text().splitlines()[0].split(",")) >= NAMES
    hessian = Hessian(model, "mse", (X, T), verbose=0)
    for epoch, seen in enumerate(weights.seen):
        model.set_weights(seen)
        values = np.linalg.eigvalsh(hessian.dense().astype("float64"))
        size = np.abs(values).max()
        assert history["hessian_max_eigenvalue"][epoch] == pytest.approx(values[-1], rel=1e-3)
        assert history["hessian_min_eigenvalue"][epoch] == pytest.approx(values[0], rel=1e-3, abs=1e-4 * size)
        # As many products as the matrix has rows: it is exact.
        assert history["hessian_trace"][epoch] == pytest.approx(values.sum(), rel=1e-4)
        assert history["hessian_trace_error"][epoch] == pytest.approx(0.0, abs=1e-6 * size)
        assert history["gradient_norm"][epoch] == pytest.approx(np.linalg.norm(hessian.gradient()), rel=1e-4)
        expected = 0.05 * history["hessian_max_eigenvalue"][epoch]
        assert history["sharpness_times_learning_rate"][epoch] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch_size", [pytest.param(256, marks=pytest.mark.fast_on("torch")), 7])
def test_values_by_few_products(batch_size):
    model, weights = compiled(hidden=12), Weights()
    monitor = CurvatureMonitor((X, T), trace_matvecs=8, batch_size=batch_size)
    history = model.fit(X, T, batch_size=8, epochs=4, verbose=0, callbacks=[monitor, weights]).history
    hessian = Hessian(model, "mse", (X, T), verbose=0)
    for epoch, seen in enumerate(weights.seen):
        model.set_weights(seen)
        values = np.linalg.eigvalsh(hessian.dense().astype("float64"))
        size = np.abs(values).max()
        # The smallest one has neighbours: that of one of them is as good to an estimate by a few products.
        assert history["hessian_max_eigenvalue"][epoch] == pytest.approx(values[-1], abs=2e-2 * size)
        assert history["hessian_min_eigenvalue"][epoch] == pytest.approx(values[0], abs=5e-2 * size)
        error = history["hessian_trace_error"][epoch]
        assert 0 < error < size and abs(history["hessian_trace"][epoch] - values.sum()) < 5 * error
        assert history["gradient_norm"][epoch] == pytest.approx(np.linalg.norm(hessian.gradient()), rel=1e-4)


def test_curvature_that_is_not_finite():
    model = compiled(hidden=12)
    monitor = CurvatureMonitor((X, T))
    monitor.set_model(model)
    monitor.on_train_begin()
    model.layers[0].kernel.assign(np.full((D, 12), np.nan))
    monitor.on_epoch_end(0, {})
    assert np.isnan([monitor.last["hessian_max_eigenvalue"], monitor.last["hessian_trace"]]).all()


def test_nothing_changes():
    alone, watched = compiled(), compiled()
    alone.fit(X, T, batch_size=8, epochs=2, verbose=0, shuffle=False)
    watched.fit(X, T, batch_size=8, epochs=2, verbose=0, shuffle=False, callbacks=[CurvatureMonitor((X, T), every=1)])
    for a, b in zip(alone.get_weights(), watched.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_stopping_by_it():
    class Seen(keras.callbacks.Callback):
        epochs = 0

        def on_epoch_end(self, epoch, logs=None):
            self.epochs += 1

    stop = keras.callbacks.EarlyStopping("gradient_norm", mode="max", patience=1)
    seen = Seen()
    compiled().fit(X, T, epochs=20, verbose=0, callbacks=[CurvatureMonitor((X, T), trace_matvecs=0), stop, seen])
    assert 1 < seen.epochs < 20


def test_every_few_batches():
    monitor = CurvatureMonitor((X, T), every=2, trace_matvecs=0)
    history = compiled().fit(X, T, batch_size=8, epochs=2, verbose=0, callbacks=[monitor]).history
    assert history["hessian_max_eigenvalue"][-1] == monitor.last["hessian_max_eigenvalue"]
    assert "hessian_trace" not in history


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"every": "batch"}, "as `every`"),
        ({"tol": 0.0}, "as `tol`"),
        ({"trace_matvecs": 1}, "as `trace_matvecs`"),
        ({"trace_matvecs": True}, "as `trace_matvecs`"),
    ],
)
def test_options(options, match):
    with pytest.raises(ValueError, match=match):
        CurvatureMonitor((X, T), **options)


def test_a_model_without_a_loss():
    model = keras.Sequential([keras.Input((D,)), layers.Dense(1)])
    model.compile("sgd")
    monitor = CurvatureMonitor((X, T))
    monitor.set_model(model)
    with pytest.raises(ValueError, match="a loss, or a compiled model"):
        monitor.on_train_begin()
