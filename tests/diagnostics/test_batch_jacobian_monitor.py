"""`BatchJacobianMonitor` in Keras' own loop."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_gradtools.callbacks import BatchJacobianMonitor
from keras_gradtools.diagnostics import jacobian_spectrum

RNG = np.random.default_rng(15)
X = RNG.normal(size=(24, 5)).astype("float32")
T = RNG.normal(size=(24, 3)).astype("float32")
PROBE = X[:6]
NAMES = {
    "jacobian_spectral_norm_mean",
    "jacobian_spectral_norm_max",
    "jacobian_frobenius_norm_mean",
    "jacobian_frobenius_norm_max",
    "jacobian_condition_number_median",
    "jacobian_effective_rank_mean",
    "jacobian_dynamical_isometry",
    "jacobian_local_lipschitz_mean",
    "jacobian_local_lipschitz_max",
}


def compiled(*more, rate=0.05):
    model = keras.Sequential([keras.Input((5,)), layers.Dense(8, "tanh"), *more, layers.Dense(3)])
    draw = np.random.default_rng(1)
    model.set_weights([np.abs(draw.normal(size=w.shape)) + 0.1 for w in model.get_weights()])
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


def test_values_are_those_of_numpy(tmp_path):
    model, weights, log = compiled(), Weights(), tmp_path / "log.csv"
    monitor = BatchJacobianMonitor(PROBE, radius=1e-2)
    callbacks = [monitor, weights, keras.callbacks.CSVLogger(log)]
    history = model.fit(X, T, batch_size=8, epochs=3, verbose=0, callbacks=callbacks).history
    assert set(history) >= NAMES and set(log.read_text().splitlines()[0].split(",")) >= NAMES
    assert len(monitor.spectra) == 3
    for epoch, (kernel, bias, out, _) in enumerate(weights.seen):
        slopes = 1 - np.tanh(PROBE @ kernel + bias) ** 2
        jacobians = np.einsum("ij,bj,jk->bki", kernel, slopes, out).astype("float64")
        values = np.linalg.svd(jacobians, compute_uv=False)
        np.testing.assert_allclose(monitor.spectra[epoch], values, rtol=1e-4, atol=1e-5 * values.max())
        expected = {
            "jacobian_spectral_norm_mean": values[:, 0].mean(),
            "jacobian_spectral_norm_max": values[:, 0].max(),
            "jacobian_frobenius_norm_mean": np.linalg.norm(values, axis=1).mean(),
            "jacobian_frobenius_norm_max": np.linalg.norm(values, axis=1).max(),
            "jacobian_condition_number_median": np.median(values[:, 0] / values[:, -1]),
            "jacobian_dynamical_isometry": np.sqrt(((values - 1) ** 2).mean()),
        }
        for name, value in expected.items():
            assert history[name][epoch] == pytest.approx(value, rel=1e-3), name
        p = values / values.sum(axis=1, keepdims=True)
        rank = np.exp(-(p * np.log(p)).sum(axis=1)).mean()
        assert history["jacobian_effective_rank_mean"][epoch] == pytest.approx(rank, rel=1e-3)
        # In a small ball, from below, and five steps of power iteration near.
        lipschitz = history["jacobian_local_lipschitz_max"][epoch]
        assert 0.9 * values[:, 0].max() < lipschitz < 1.02 * values[:, 0].max()
    assert history["jacobian_spectral_norm_max"][0] != history["jacobian_spectral_norm_max"][2]


def test_implicit_norms():
    monitor = BatchJacobianMonitor(PROBE, method="implicit")
    model = compiled()
    history = model.fit(X, T, epochs=2, verbose=0, callbacks=[monitor]).history
    expected = jacobian_spectrum(model, PROBE)
    assert history["jacobian_spectral_norm_max"][-1] == pytest.approx(expected.spectral_norm.max(), rel=1e-2)
    assert history["jacobian_frobenius_norm_mean"][-1] == pytest.approx(expected.frobenius_norm.mean(), rel=1e-3)
    assert "jacobian_effective_rank_mean" not in history and monitor.spectra == []


def test_nothing_changes():
    alone, watched = compiled(layers.BatchNormalization()), compiled(layers.BatchNormalization())
    alone.fit(X, T, batch_size=8, epochs=2, verbose=0, shuffle=False)
    watched.fit(X, T, batch_size=8, epochs=2, verbose=0, shuffle=False, callbacks=[BatchJacobianMonitor(PROBE, 1)])
    for a, b in zip(alone.get_weights(), watched.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


class Counted(layers.Layer):
    """Counts how often Python calls it."""

    calls = 0

    def call(self, x):
        Counted.calls += 1
        return x


def test_the_probe_is_traced_once(backend):
    model = compiled(Counted())
    monitor = BatchJacobianMonitor(PROBE)
    counts = []

    class Count(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            counts.append(Counted.calls)

    model.fit(X, T, epochs=4, verbose=0, callbacks=[monitor, Count()])
    # On torch, `fit` itself runs Python once for each of its batches.
    assert counts[-1] - counts[-2] == (1 if backend == "torch" else 0)


def test_stopping_by_it():
    seen = Weights()
    stop = keras.callbacks.EarlyStopping("jacobian_spectral_norm_max", mode="max", patience=1, baseline=1e9)
    monitor = BatchJacobianMonitor(PROBE, quantities="spectral_norm")
    compiled().fit(X, T, epochs=20, verbose=0, callbacks=[monitor, stop, seen])
    assert len(seen.seen) < 20


def test_every_few_batches():
    monitor = BatchJacobianMonitor(PROBE, every=2, quantities=("spectral_norm",))
    history = compiled().fit(X, T, batch_size=8, epochs=2, verbose=0, callbacks=[monitor]).history
    assert history["jacobian_spectral_norm_max"][-1] == monitor.last["jacobian_spectral_norm_max"]
    assert len(monitor.spectra) == 3 and "jacobian_frobenius_norm_mean" not in history


def test_a_diverged_model_is_logged_as_nan():
    model = compiled(rate=1e30)
    history = model.fit(X, T, epochs=2, verbose=0, callbacks=[BatchJacobianMonitor(PROBE)]).history
    assert np.isnan(history["jacobian_spectral_norm_max"][-1])


def test_examples_that_depend_on_one_another():
    model = compiled(layers.BatchNormalization(name="norm"))
    with pytest.raises(ValueError, match="BatchJacobianMonitor: .*'norm'"):
        model.fit(X, T, verbose=0, callbacks=[BatchJacobianMonitor(PROBE, training=True)])


def test_all_values_of_what_is_not_formed():
    monitor = BatchJacobianMonitor(PROBE, quantities=("effective_rank",), method="implicit")
    with pytest.raises(ValueError, match="effective_rank"):
        compiled().fit(X, T, verbose=0, callbacks=[monitor])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"every": "batch"}, "as `every`"),
        ({"quantities": ("norm",)}, "as `quantities`"),
        ({"quantities": ()}, "as `quantities`"),
        ({"training": None}, "as `training`"),
        ({"method": "svd"}, "as `method`"),
        ({"radius": -1.0}, "as `radius`"),
        ({"seed": 0.5}, "as `seed`"),
    ],
)
def test_options(options, match):
    with pytest.raises(ValueError, match=match):
        BatchJacobianMonitor(PROBE, **options)
