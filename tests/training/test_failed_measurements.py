"""No callback ends a training by what could be known as it begins; what a model does not have is left out."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.callbacks import (
    BatchJacobianMonitor,
    CurvatureMonitor,
    GradientMonitor,
    NewtonStep,
    RobustnessMonitor,
)

RNG = np.random.default_rng(8)
N, D = 8, 3
X = RNG.uniform(size=(N, D)).astype("float32")
T = RNG.normal(size=(N, 1)).astype("float32")
CLASSES = (X[:, 0] > 0.5).astype("int32")


class Contrast(keras.Model):
    """Logits of each example against all others of the batch, as in CLIP: an example alone has one."""

    def __init__(self):
        super().__init__()
        self.embed = layers.Dense(4)

    def call(self, x):
        z = self.embed(x)
        return ops.matmul(z, ops.transpose(z))


def contrast():
    model = Contrast()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01), loss)
    model(X)
    return model, np.arange(N)


def left_out(caught):
    return [str(w.message) for w in caught if "leaves out" in str(w.message)]


def fit(model, y, callback, x=X, epochs=2):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = model.fit(x, y, epochs=epochs, batch_size=N, verbose=0, callbacks=[callback]).history
    return history, left_out(caught)


def never_begins(model, callback, match, y=T, x=X):
    """An error before the first epoch, with the weights as they were."""
    begun = []
    seen = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: begun.append(epoch))
    before = model.get_weights()
    with pytest.raises(ValueError, match=match):
        model.fit(x, y, epochs=2, batch_size=N, verbose=0, callbacks=[callback, seen])
    assert not begun
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def regression(*parts):
    model = keras.Sequential([keras.Input((D,)), *parts, layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.01), "mse")
    return model


def classifier():
    model = keras.Sequential([keras.Input((D,)), layers.Dense(2)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


class DifferentiableOnce(layers.Layer):
    """Its second derivative raises."""

    def call(self, x):
        def fun(x):
            def gradient(upstream):
                return second(upstream * 2.0)

            return 2.0 * x, gradient

        def second(u):
            def refuse(v):
                raise ValueError("no second derivative")

            return kg.custom_gradient(lambda u: (u * 1.0, refuse))(u)

        return kg.custom_gradient(fun)(x)


class TestGradientMonitor:
    def test_examples_that_cannot_stand_alone(self):
        model, y = contrast()
        history, warned = fit(model, y, GradientMonitor((X, y)), epochs=3)
        assert len(warned) == 1 and "'gradient_noise_scale'" in warned[0] and "on each example alone" in warned[0]
        assert "gradient_noise_scale" not in history and len(history["gradient_norm"]) == 3

    def test_the_function_says_so(self):
        model, y = contrast()
        with pytest.raises(ValueError, match=r"the same output as in a batch. Received: from a batch of 8, .*\(8"):
            kg.diagnostics.gradient_noise_scale(model, None, (X, y))

    def test_one_derivative_is_enough(self, backend):
        if backend == "jax":
            pytest.skip("JAX traces all derivatives of a custom gradient as it is called")
        history, warned = fit(regression(layers.Dense(4), DifferentiableOnce()), T, GradientMonitor((X, T)))
        assert not warned and len(history["gradient_norm"]) == 2 and len(history["gradient_noise_scale"]) == 2

    def test_one_example(self):
        history, warned = fit(regression(), T, GradientMonitor((X[:1], T[:1])))
        assert len(warned) == 1 and "two examples or more" in warned[0]
        assert "gradient_noise_scale" not in history and "gradient_norm" in history

    def test_a_loss_of_the_batch(self):
        model = regression()
        model.compile("sgd", lambda y, z: ops.mean((y - z) ** 2))
        never_begins(model, GradientMonitor((X, T)), "needs a loss with one value for each example")


class TestTheOthers:
    def test_a_second_derivative_that_there_is_not(self, backend):
        if backend == "jax":
            pytest.skip("JAX traces all derivatives of a custom gradient as it is called")
        model = regression(layers.Dense(4), DifferentiableOnce())
        for callback in (CurvatureMonitor((X, T)), NewtonStep((X, T))):
            never_begins(model, callback, "no second derivative")

    def test_data_that_change(self):
        class Changing:
            def __iter__(self):
                yield RNG.normal(size=(4, D)).astype("float32"), T[:4]

        for cls in (CurvatureMonitor, NewtonStep, GradientMonitor):
            never_begins(regression(), cls(Changing()), "needs the same examples each time")

    def test_data_that_are_not_finite(self):
        never_begins(regression(), NewtonStep((np.inf * X, T)), "NewtonStep expects finite data")

    def test_the_examples_of_an_attack(self):
        for x, y, match in (
            (X + 1, CLASSES, "within the range `clip`"),
            (X, CLASSES + 5, "expects classes from 0 to 1"),
        ):
            never_begins(classifier(), RobustnessMonitor((x, y)), match, y=CLASSES)
        with pytest.raises(ValueError, match=r"arrays of shape \(batch, ...\) .*Received: 'text'"):
            RobustnessMonitor(({"x": "text"}, CLASSES))

    def test_integers_have_no_jacobian(self):
        with pytest.raises(ValueError, match="floating-point inputs.*int32"):
            BatchJacobianMonitor(np.ones((N, 2), "int32"))

    def test_what_fails_later(self, monkeypatch):
        def fail(*args, **kwargs):
            raise RuntimeError("in its own way\nand more")

        monitor = RobustnessMonitor((X, CLASSES), epsilons=(0.1,), steps=1, jacobian=False)
        monkeypatch.setattr(monitor._metrics, "measure", fail)
        history, warned = fit(classifier(), CLASSES, monitor)
        assert warned == [
            "RobustnessMonitor leaves out 'all metrics', which it cannot measure for this model and data: "
            "RuntimeError: in its own way"
        ]
        assert len(history["loss"]) == 2


@pytest.mark.parametrize("x", [{"image": X, "other": X}, [X, X]], ids=["dict", "list"])
def test_an_attack_prints_no_numbers(x):
    with pytest.raises(ValueError) as caught:
        kg.attacks.fgsm(classifier(), x, CLASSES, 0.1, verbose=0)
    message = str(caught.value)
    assert "dtype float32 and shape (8, 3)" in message and "[0." not in message
