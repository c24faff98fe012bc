"""`Monitor`, the base class of the monitors, by subclasses of it, in Keras' own loop."""

import gc
import warnings
import weakref

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.callbacks import BatchJacobianMonitor, CurvatureMonitor, GradientMonitor, Monitor, NewtonStep
from keras_gradtools.training.schedule import Schedule
from tests.event_files import events_of

# With this loss, a step of gradient descent multiplies the weight by 1 - 2 * RATE.
X, Y = np.ones((12, 1), "float32"), np.zeros((12, 1), "float32")
RATE = 0.25
BATCH = 4  # 3 batches in an epoch


class Weight(Monitor):
    """The weight of `linear()`, and what of `fit` is seen."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.called, self.steps = [], []

    def begin(self):
        self.called.append("begin")

    def measure(self):
        self.called.append("measure")
        self.steps.append(self.step)
        return {"weight": self.model.get_weights()[0].item()}

    def end(self):
        self.called.append("end")


class Seen(keras.callbacks.Callback):
    """The logs of the batches and of the epochs."""

    def __init__(self):
        super().__init__()
        self.of_batches, self.of_epochs = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.of_batches.append(logs.get("weight"))

    def on_epoch_end(self, epoch, logs=None):
        self.of_epochs.append(logs.get("weight"))


def linear(**options):
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1, use_bias=False)])
    model.set_weights([np.ones((1, 1))])
    model.compile(keras.optimizers.SGD(RATE), "mse", **options)
    return model


def fit(*callbacks, model=None, epochs=2, **options):
    model = linear() if model is None else model
    return model.fit(X, Y, batch_size=BATCH, epochs=epochs, verbose=0, callbacks=list(callbacks), **options).history


def weights_after(*steps):
    return pytest.approx([0.5**step for step in steps], rel=1e-6)


class TestSchedule:
    def test_every_epoch_by_default(self):
        monitor, seen = Weight(), Seen()
        history = fit(monitor, seen)
        assert history["weight"] == weights_after(3, 6) == seen.of_epochs
        assert seen.of_batches == [None] * 6 and monitor.steps == [0, 1]
        assert monitor.last == {"weight": history["weight"][-1]}
        assert monitor.called == ["begin", "measure", "measure", "end"]

    def test_every_second_batch(self):
        monitor, seen = Weight(every=2), Seen()
        history = fit(monitor, seen, epochs=3)
        assert seen.of_batches[1::2] == weights_after(2, 4, 6, 8) and seen.of_batches[::2] == [None] * 5
        # An epoch has the last values.
        assert history["weight"] == weights_after(2, 6, 8) == seen.of_epochs
        assert monitor.steps == [2, 4, 6, 8]

    def test_every_second_epoch(self):
        monitor, seen = Weight(every="2 epochs"), Seen()
        history = fit(monitor, seen, epochs=5)
        assert history["weight"] == weights_after(6, 12)
        assert [value is None for value in seen.of_epochs] == [True, False, True, False, True]
        assert monitor.steps == [1, 3]

    def test_the_number_of_an_epoch_is_that_of_keras(self):
        monitor = Weight(every="2 epochs")
        fit(monitor, initial_epoch=1, epochs=4)
        assert monitor.steps == [1, 3]

    def test_each_fit_counts_from_zero(self):
        monitor, model = Weight(every=5), linear()
        fit(monitor, model=model)
        fit(monitor, model=model)
        assert monitor.steps == [5, 5]

    def test_epochs_of_one_batch(self):
        monitor = Weight(every=2)
        linear().fit(X, Y, batch_size=12, epochs=4, verbose=0, callbacks=[monitor])
        assert monitor.steps == [2, 4]

    @pytest.mark.usefixtures("needs_steps_per_execution")
    @pytest.mark.parametrize(("every", "steps"), [(1, [2, 3, 5, 6]), (2, [2, 5, 6]), (3, [3, 6]), (4, [5])])
    def test_batches_that_end_at_once(self, every, steps):
        monitor = Weight(every=every)
        fit(monitor, model=linear(steps_per_execution=2))
        assert monitor.steps == steps

    @pytest.mark.parametrize("every", ["epochs", "0 epochs", "-1 epochs", "5", "2  epochs", "1.5 epochs", "batch", 0])
    def test_what_it_does_not_know(self, every):
        with pytest.raises(ValueError, match="Weight expects 'epoch', a number of epochs such as '5 epochs', or a pos"):
            Weight(every=every)

    def test_what_it_knows(self):
        for every in ("epoch", "1 epoch", "1 epochs"):
            assert [Schedule("me", every).is_due_after_epoch(i) for i in range(3)] == [True] * 3
        tenth = Schedule("me", "10 epochs")
        assert [i for i in range(40) if tenth.is_due_after_epoch(i)] == [9, 19, 29, 39]


class TestLogs:
    def test_a_prefix(self):
        monitor = Weight(prefix="my_")
        assert fit(monitor)["my_weight"] == weights_after(3, 6)
        assert set(monitor.last) == {"my_weight"}

    def test_tensors_are_logged_as_numbers(self):
        class Norm(Monitor):
            def measure(self):
                return {"norm": ops.norm(self.model.trainable_variables[0]), "count": 3}

        (norm,) = fit(monitor := Norm(), epochs=1)["norm"]
        assert isinstance(monitor.last["norm"], float) and norm == pytest.approx(0.125)
        assert monitor.last["count"] == 3

    @pytest.mark.parametrize("every", ["epoch", 2])
    def test_later_callbacks_act_on_them(self, every):
        stop = keras.callbacks.EarlyStopping("weight", mode="max", patience=0)
        assert len(fit(Weight(every), stop, epochs=9)["loss"]) == 2

    @pytest.mark.parametrize(("every", "steps"), [("epoch", [0, 1]), (2, [2, 4, 6])])
    def test_event_files(self, tmp_path, every, steps):
        class Histogram(Weight):
            def histograms(self):
                return {"kernel": np.arange(self.step + 1.0)}

        monitor = Histogram(every, log_dir=tmp_path)
        fit(monitor)
        scalars, sizes = {}, {}
        for event in events_of(tmp_path):
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    scalars[event.step] = (value.tag, value.simple_value)
                else:
                    sizes[event.step] = (value.tag, value.histo.num)
        last = steps if every == 2 else [3, 6]
        assert scalars == {step: ("weight", 0.5**n) for step, n in zip(steps, last, strict=True)}
        assert sizes == {step: ("kernel", step + 1) for step in steps}

    def test_what_is_no_dict(self):
        class Wrong(Monitor):
            def measure(self):
                return 3.0

        with pytest.raises(ValueError, match=r"Wrong expects that `measure` returns a dict .*Received: 3\.0"):
            fit(Wrong())

    def test_measure_has_to_be_written(self):
        with pytest.raises(NotImplementedError, match="Monitor has to override `measure`"):
            fit(Monitor())


class TestTraining:
    def test_weights_can_be_assigned(self):
        class Reset(Monitor):
            def measure(self):
                self.model.trainable_variables[0].assign([[1.0]])
                return {"last": self.model.get_weights()[0].item()}

        model = linear()
        history = fit(Reset(every=2), model=model)
        # 6 steps, and the weight is 1 after each second one.
        assert model.get_weights()[0].item() == 1.0 and history["last"] == [1.0, 1.0]
        fit(Reset(every=4), model=model)
        assert model.get_weights()[0].item() == pytest.approx(0.25)

    def test_derivatives_of_the_current_weights(self):
        class Slope(Monitor):
            def measure(self):
                x = ops.ones((1, 1))
                return {"slope": kg.grad(lambda x: ops.sum(self.model(x)))(x)[0, 0]}

        seen = []
        slope = Slope(every=1)
        note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(slope.last["slope"]))
        fit(slope, note)
        assert seen == weights_after(*range(1, 7))

    @pytest.mark.parametrize("every", ["epoch", 2])
    def test_the_model_predicts_and_evaluates(self, every):
        class Loss(Monitor):
            def measure(self):
                prediction = self.model.predict(X, verbose=0)[0, 0]
                return {"predicted": float(prediction), "evaluated": self.model.evaluate(X, Y, verbose=0)}

        model = linear()
        history = fit(Loss(every), model=model)
        assert history["predicted"] == (weights_after(3, 6) if every == "epoch" else weights_after(2, 6))
        assert np.sqrt(history["evaluated"]) == pytest.approx(history["predicted"])
        # Training goes on as without it.
        assert model.get_weights()[0].item() == pytest.approx(0.5**6)

    def test_an_attempt_that_fails_warns_once(self):
        class Fails(Monitor):
            def measure(self):
                def fail():
                    raise RuntimeError("in its own way")

                return {"failed": float(self.attempt("what fails", fail) is None)}

        monitor = Fails()
        for _ in range(2):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert fit(monitor)["failed"] == [1.0, 1.0]
            (message,) = [str(w.message) for w in caught if "leaves out" in str(w.message)]
            assert message.startswith("Fails leaves out 'what fails'") and message.endswith(
                "RuntimeError: in its own way"
            )

    def test_other_errors_are_raised(self):
        class Wrong(Monitor):
            def measure(self):
                raise RuntimeError("in its own way")

        with pytest.raises(RuntimeError, match="in its own way"):
            fit(Wrong())

    def test_batch_hooks_of_a_subclass_do_not_run_in_another_thread(self):
        class Own(Weight):
            def on_train_batch_end(self, batch, logs=None):
                super().on_train_batch_end(batch, logs)

        assert Weight().async_safe and Weight("2 epochs").async_safe
        assert not Weight(2).async_safe and not Own().async_safe


MONITORS = {
    "curvature": lambda: CurvatureMonitor((X, Y)),
    "gradients": lambda: GradientMonitor((X, Y)),
    "newton": lambda: NewtonStep((X, Y), damping=1.0),
    "newton, dense": lambda: NewtonStep((X, Y), solver="dense", damping=1.0, curvature="gauss_newton"),
}


@pytest.mark.parametrize("name", MONITORS)
def test_no_operator_is_left_after_training(name):
    monitor, operators = MONITORS[name](), []

    def note(epoch, logs):
        operators.append(weakref.ref(monitor._operator))

    model = linear()
    fit(monitor, keras.callbacks.LambdaCallback(on_epoch_end=note), model=model)
    gc.collect()
    assert [operator() for operator in operators] == [None] * 2


def test_no_examples_are_left_after_training():
    monitor, examples = BatchJacobianMonitor(X[:2]), []

    def note(epoch, logs):
        examples.append(weakref.ref(monitor._examples))

    fit(monitor, keras.callbacks.LambdaCallback(on_epoch_end=note))
    gc.collect()
    assert [x() for x in examples] == [None] * 2


class TestACallbackThatIsInNoList:
    """Keras takes it, and then runs its hooks in another thread, except on TensorFlow."""

    def test_measured_between_steps_it_is_an_error(self, backend):
        if backend == "tensorflow":
            pytest.skip("on TensorFlow, Keras runs all hooks in the thread of `fit`")
        with pytest.raises(RuntimeError, match="Weight measures between training steps.*a list with this Weight"):
            linear().fit(X, Y, batch_size=BATCH, verbose=0, callbacks=Weight(every=1))

    def test_measured_after_epochs_it_is_right(self):
        monitor = Weight()
        linear().fit(X, Y, batch_size=BATCH, epochs=2, verbose=0, callbacks=monitor)
        assert monitor.last["weight"] == pytest.approx((1 - 2 * RATE) ** 6)
