"""What the progress bar of `fit` shows of four monitors, and that the history and other callbacks have all of it."""

import re
import threading

import keras
import numpy as np
import pytest
from keras import layers

import keras_gradtools as kg

RNG = np.random.default_rng(0)
X = RNG.uniform(size=(16, 4)).astype("float32")
Y = np.arange(16) % 2
KEYS = [
    "gradient_norm",
    "hessian_max_eigenvalue",
    "jacobian_spectral_norm_max",
    "val_pgd_0.1_accuracy",
]


def model():
    made = keras.Sequential([keras.Input((4,)), layers.Dense(6, "relu", name="first"), layers.Dense(2, name="out")])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    made.compile(keras.optimizers.SGD(0.01), loss)
    return made


def monitors(**options):
    cb = kg.callbacks
    return [
        cb.GradientMonitor((X, Y), **options),
        cb.CurvatureMonitor((X, Y), **options),
        cb.BatchJacobianMonitor(X[:3], **options),
        cb.RobustnessMonitor((X, Y), steps=1, **options),
    ]


def names_in(line):
    return re.findall(r" - (\S+): ", line)


class Constant(kg.callbacks.Monitor):
    def measure(self):
        return {"a": 1.0, "b": 2.0, "c": 3.0}


class KeyOfConstant(Constant):
    KEY_NUMBERS = ("b",)


def lines(capsys, callbacks, epochs=1, verbose=2, trained=None):
    """The names in the last line of the output, and the history."""
    trained = trained or model()
    history = trained.fit(X, Y, batch_size=8, epochs=epochs, verbose=verbose, callbacks=callbacks)
    return names_in(capsys.readouterr().out.rstrip().splitlines()[-1].rpartition("\r")[2]), history.history


class Seen(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.logs = dict(logs)


@pytest.mark.parametrize("verbose", [1, pytest.param(2, marks=pytest.mark.fast_on("torch"))])
def test_four_monitors(capsys, verbose, tmp_path):
    seen = Seen()
    stop = keras.callbacks.EarlyStopping("jacobian_effective_rank_mean", mode="min", patience=9)
    best = keras.callbacks.ModelCheckpoint(tmp_path / "m.keras", "gradient_norm/first", mode="min", save_best_only=True)
    found = model().fit(X, Y, batch_size=8, verbose=verbose, callbacks=[*(given := monitors()), seen, stop, best])
    line = capsys.readouterr().out.rstrip().splitlines()[-1].rpartition("\r")[2]
    assert names_in(line) == ["loss", *KEYS] and len(line) < 250
    measured = {name for monitor in given for name in monitor.last}
    assert len(measured) > 25 and measured <= set(found.history) and measured <= set(seen.logs)
    assert stop.best is not None and np.isfinite(stop.best) and (tmp_path / "m.keras").exists()


@pytest.mark.fast_on("torch")
def test_all_and_none(capsys):
    shown, history = lines(capsys, monitors(progress_bar=True))
    assert set(shown) == set(history)
    assert lines(capsys, monitors(progress_bar=False))[0] == ["loss"]


@pytest.mark.parametrize(
    ("monitor", "expected"),
    [
        (Constant(), ["a", "b", "c"]),
        (KeyOfConstant(), ["b"]),
        (KeyOfConstant(prefix="p_"), ["p_b"]),
        (KeyOfConstant(progress_bar=True), ["a", "b", "c"]),
        (Constant(progress_bar=["c", "other"]), ["c"]),
        (Constant(every=1, progress_bar=["c"]), ["c"]),
    ],
)
def test_chosen(capsys, monitor, expected):
    assert lines(capsys, [monitor])[0] == ["loss", *expected]


def test_without_the_key_numbers_the_first_is_shown(capsys):
    monitor = kg.callbacks.GradientMonitor((X, Y), quantities="update_to_weight_ratio")
    assert lines(capsys, [monitor])[0] == ["loss", "update_to_weight_ratio"]


def test_what_one_monitor_shows_no_other_one_hides(capsys):
    assert lines(capsys, [Constant(progress_bar=False), Constant(progress_bar=["a"])])[0] == ["loss", "a"]


def test_other_trainings_show_everything(capsys):
    trained = model()
    trained.fit(X, Y, verbose=0, callbacks=[Constant(progress_bar=False)])

    class Logs(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs["a"] = 1.0

    assert lines(capsys, [Logs()], trained=trained)[0] == ["loss", "a"]


@pytest.mark.parametrize("verbose", [1, 2])
def test_no_other_thread_touches_the_weights(verbose, backend):
    """On JAX, Keras runs the progress bar's hook in another thread, while the next step replaces all variables."""
    trained = model()
    hooks, synced = [], []

    class Hook(keras.callbacks.Callback):
        async_safe = True

        def on_train_batch_end(self, batch, logs=None):
            hooks.append(threading.current_thread())

    if backend == "jax":
        sync = trained.jax_state_sync

        def noting_sync():
            synced.append(threading.current_thread())
            sync()

        trained.jax_state_sync = noting_sync
    trained.fit(X, Y, batch_size=2, verbose=verbose, callbacks=[Constant(progress_bar=["a"]), Hook()])
    here = threading.current_thread()
    assert len(hooks) == 8
    if backend == "jax":
        assert here not in hooks, "Keras runs these hooks in the same thread, and this test has shown nothing"
    assert set(synced) <= {here}


@pytest.mark.parametrize("given", ["loss", 3, ["a", 1], {"a"}])
def test_refused(given):
    with pytest.raises(ValueError, match="None, True, False or a list of names as `progress_bar`"):
        Constant(progress_bar=given)
