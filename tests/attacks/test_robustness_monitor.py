"""`RobustnessMonitor` in Keras' own loop."""

import functools
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_gradtools.attacks import FGSM, robustness_metrics
from keras_gradtools.callbacks import RobustnessMonitor
from keras_gradtools.models import AdversarialTraining, InputGradientRegularized

RNG = np.random.default_rng(3)
N, D = 16, 3
X = RNG.uniform(0.1, 0.9, (N, D)).astype("float32")
Y = (X[:, 0] > X[:, 1]).astype("int32")
KERNEL = np.array([[-0.2, 0.2], [0.1, -0.1], [0.3, 0.2]], "float32")
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
OPTIONS = {"epsilons": (0.1,), "steps": 2, "jacobian": False}


def linear():
    model = one_linear_model()
    model.set_weights([KERNEL])
    return model


# What is compiled is kept with the model: most of the time would go there.
@functools.cache
def one_linear_model():
    return keras.Sequential([keras.Input((D,)), layers.Dense(2, use_bias=False)])


def with_state():
    model = keras.Sequential(
        [keras.Input((D,)), layers.Dense(4), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(2)]
    )
    draw = np.random.default_rng(1).normal
    model.layers[0].set_weights([draw(size=(D, 4)), draw(size=4)])
    model.layers[-1].set_weights([draw(size=(4, 2)), draw(size=2)])
    return model


def fit(model, *callbacks, rate=0.5, epochs=2, **kwargs):
    model.compile(keras.optimizers.SGD(rate), LOSS)
    return model.fit(X, Y, batch_size=8, epochs=epochs, verbose=0, callbacks=list(callbacks), **kwargs).history


class Quantized(layers.Layer):
    def call(self, x):
        return ops.round(8 * x) / 8 + 0 * x


@functools.cache
def quantizing():
    model = keras.Sequential([keras.Input((D,)), Quantized(), layers.Dense(2, use_bias=False)])
    model.set_weights([10 * np.array([[-1.0, 1.0], [1.0, -1.0], [0.0, 0.0]])])
    return model


def fit_with_state(wrap, *callbacks):
    keras.utils.set_random_seed(1)
    model = with_state()
    history = fit(wrap(model), *callbacks)
    return model.get_weights(), history


@functools.cache
def monitored(wrap):
    return fit_with_state(wrap, RobustnessMonitor((X, Y), **OPTIONS))


WRAPPERS = [
    lambda model: model,
    pytest.param(lambda model: InputGradientRegularized(model, 0.1), marks=pytest.mark.fast_on("torch")),
    lambda model: AdversarialTraining(model, FGSM(0.1)),
]


@functools.cache
def another_model():
    return with_state()


@pytest.mark.parametrize("wrap", WRAPPERS, ids=["plain", "InputGradientRegularized", "AdversarialTraining"])
class TestOnAModelWithState:
    def test_the_last_values_are_those_of_the_trained_model(self, wrap):
        weights, history = monitored(wrap)
        # Nothing that was compiled or kept for the model of the callback is used here.
        another_model().set_weights(weights)
        expected = robustness_metrics(another_model(), X, Y, verbose=0, **OPTIONS)
        found = {name: history[f"val_{name}"][-1] for name in expected}
        assert found == pytest.approx(expected, rel=1e-4)
        assert history["val_gradient_norm_mean"][0] != pytest.approx(found["gradient_norm_mean"], rel=1e-3)

    def test_training_goes_as_without_the_monitor(self, wrap):
        without, _ = fit_with_state(wrap)
        for was, now in zip(without, monitored(wrap)[0], strict=True):
            np.testing.assert_array_equal(now, was)
        # The statistics have moved.
        assert np.abs(without[4]).max() > 0.01


class TestHistory:
    def test_they_stand_beside_those_of_the_validation(self):
        monitor = RobustnessMonitor((X, Y), **OPTIONS | {"jacobian": True})
        history = fit(linear(), monitor, validation_data=(X, Y))
        assert {"val_loss", "val_clean_accuracy", "val_pgd_0.1_accuracy", "val_jacobian_norm"} <= history.keys()
        assert len(history["val_loss"]) == len(history["val_pgd_0.1_accuracy"]) == 2
        assert history["val_jacobian_norm"][-1] == pytest.approx(
            np.linalg.norm(one_linear_model().get_weights()[0]), rel=1e-5
        )

    def test_only_every_second_epoch(self):
        epochs = []

        class Seen(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                epochs.append("val_clean_accuracy" in logs)

        history = fit(linear(), RobustnessMonitor((X, Y), every="2 epochs", **OPTIONS), Seen(), epochs=5)
        assert epochs == [False, True, False, True, False]
        assert len(history["val_clean_accuracy"]) == 2 and len(history["loss"]) == 5
        assert "val_jacobian_norm" not in history

    def test_every_second_batch(self):
        seen = []
        note = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: seen.append("val_pgd" in str(logs))
        )
        monitor = RobustnessMonitor((X, Y), every=2, **OPTIONS)
        history = fit(linear(), monitor, note, epochs=2)
        assert seen == [False, True] * 2 and len(history["val_clean_accuracy"]) == 2
        expected = robustness_metrics(one_linear_model(), X, Y, verbose=0, **OPTIONS)
        assert monitor.last == pytest.approx({f"val_{name}": value for name, value in expected.items()}, rel=1e-5)
        assert history["val_gradient_norm_mean"][-1] == monitor.last["val_gradient_norm_mean"]

    def test_a_later_callback_stops_on_them(self):
        # With a rate of zero nothing gets better after the first epoch.
        stop = keras.callbacks.EarlyStopping("val_pgd_0.1_accuracy", mode="max", patience=1)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*masked gradients")
            history = fit(linear(), RobustnessMonitor((X, Y), **OPTIONS), stop, rate=0.0, epochs=9)
        expected = robustness_metrics(linear(), X, Y, verbose=0, **OPTIONS)["pgd_0.1_accuracy"]
        assert history["val_pgd_0.1_accuracy"] == [expected] * 2


class TestMaskedGradients:
    def test_a_warning_once_and_the_signs(self):
        monitor = RobustnessMonitor((X, Y), **OPTIONS)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            history = fit(quantizing(), monitor, rate=0.0, epochs=3)
        (message,) = [str(w.message) for w in caught if "masked gradients" in str(w.message)]
        assert message.startswith("After epoch 1 ") and all(sign in message for sign in monitor.signs)
        with pytest.warns(UserWarning, match="^After batch 2 the model shows signs of masked gradients"):
            fit(quantizing(), RobustnessMonitor((X, Y), every=2, **OPTIONS), rate=0.0, epochs=1)
        assert history["val_masked_gradients"] == [len(monitor.signs)] * 3 and monitor.signs
        assert history["val_gradient_zero_share"] == [1.0] * 3

    def test_a_warning_again_after_epochs_without(self):
        model, monitor = quantizing(), RobustnessMonitor((X, Y), **OPTIONS)
        kernel = model.get_weights()

        def set_weights(epoch, logs=None):
            # With none, the model is wrong everywhere, and there is nothing to hide.
            model.set_weights([0 * kernel[0]] if epoch == 1 else kernel)

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(model, keras.callbacks.LambdaCallback(on_epoch_begin=set_weights), monitor, rate=0.0, epochs=3)
        messages = [str(w.message) for w in caught if "masked gradients" in str(w.message)]
        assert [m[:14] for m in messages] == ["After epoch 1 ", "After epoch 3 "]

    def test_no_warning_without_signs(self):
        monitor = RobustnessMonitor((X, Y), **OPTIONS)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*masked gradients")
            history = fit(linear(), monitor)
        assert monitor.signs == [] and history["val_masked_gradients"] == [0.0, 0.0]


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"every": 0}, "or a positive number of batches, as `every`. Received: every=0"),
            ({"every": True}, "or a positive number of batches, as `every`. Received: every=True"),
            ({"epsilons": ()}, "RobustnessMonitor expects a list of different positive numbers as `epsilons`"),
            ({"batch_size": 0}, "RobustnessMonitor expects a positive integer as `batch_size`"),
            ({"jacobian": None}, "RobustnessMonitor expects True or False as `jacobian`"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            RobustnessMonitor((X, Y), **options)

    @pytest.mark.parametrize("data", [X, (X,), (X, Y, Y), None])
    def test_data(self, data):
        match = (
            r"RobustnessMonitor expects arrays of shape \(batch, ...\) in a tuple \(x, y\) as `data`\. Received: data="
        )
        with pytest.raises(ValueError, match=match):
            RobustnessMonitor(data)

    def test_examples_in_the_first_measurement(self):
        with pytest.raises(ValueError, match="RobustnessMonitor expects examples within the range `clip`"):
            fit(linear(), RobustnessMonitor((X + 1, Y), **OPTIONS))
