"""A step that fails leaves everything as it was: weights, optimizer, metrics, seeds, and a model to go on with."""

import copy

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.attacks import FGSM
from keras_gradtools.callbacks import (
    BatchJacobianMonitor,
    CurvatureMonitor,
    GradientMonitor,
    NewtonStep,
    RobustnessMonitor,
)
from keras_gradtools.models import AdversarialTraining, InputGradientRegularized, SecondOrder

RNG = np.random.default_rng(5)
N, D, BATCH = 12, 3, 4
X = RNG.normal(size=(N, D)).astype("float32")
Y = RNG.normal(size=(N, 1)).astype("float32")
# A graph that fails while it is traced has changed nothing.
EAGERLY = {"run_eagerly": keras.config.backend() == "tensorflow"}
TOKENS = RNG.integers(0, 9, (N, D))


class Failing(layers.Layer):
    """Raises `error` in the call of training number `at`, counted from the time that it is set."""

    error, at = None, 0

    def call(self, x, training=None):
        if self.error is not None:
            if self.at <= 0:
                raise self.error
            self.at -= 1
        return x


def smooth():
    model = keras.Sequential(
        [
            keras.Input((D,)),
            layers.Dense(4, activation="tanh"),
            layers.BatchNormalization(),
            layers.Dropout(0.2, seed=1),
            Failing(),
            layers.Dense(1),
        ]
    )
    model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"], **EAGERLY)
    return model


def state(model):
    """Everything that there is to lose, in NumPy."""
    variables = {id(v): v for v in (*model.variables, *model.metrics_variables)}
    if getattr(model, "optimizer", None) is not None:
        variables |= {id(v): v for v in model.optimizer.variables}
    return [ops.convert_to_numpy(v).copy() for v in variables.values()]


def assert_same(before, after):
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)


def assert_unharmed(*models):
    """The weights are there, and calls and losses give numbers."""
    for model in models:
        assert all(np.isfinite(v).all() for v in state(model))
        assert not model._losses_override
        inputs = [RNG.integers(0, 9, (BATCH, *i.shape[1:])).astype(i.dtype) for i in model.inputs]
        assert np.isfinite(model.predict(inputs if len(inputs) > 1 else inputs[0], verbose=0)).all()


# --- refusals ---


def tokens():
    return keras.Sequential(
        [keras.Input((D,), dtype="int32"), layers.Embedding(9, 2), layers.Flatten(), layers.Dense(1)]
    )


def two_inputs():
    a, b = keras.Input((D,)), keras.Input((D,))
    return keras.Model([a, b], layers.Dense(1)(layers.Concatenate()([a, b])))


@pytest.mark.parametrize(
    ("model", "wrap", "x"),
    [
        (tokens, lambda m: InputGradientRegularized(m, 0.1), TOKENS),
        (two_inputs, lambda m: AdversarialTraining(m, FGSM(0.1)), [X, X]),
    ],
)
def test_what_the_inputs_of_a_model_tell_is_refused_at_once(model, wrap, x):
    model = model()
    model.compile("adam", "mse")
    model.fit(x, Y, batch_size=BATCH, verbose=0)
    before = state(model)
    with pytest.raises(
        ValueError, match="InputGradientRegularized differentiates with respect to|AdversarialTraining perturbs one"
    ):
        wrap(model)
    assert_same(before, state(model))
    assert_unharmed(model)


def test_inputs_that_are_chosen_are_looked_for_at_once():
    with pytest.raises(ValueError, match="an input in `inputs` that the model does not have. Received: 'c'"):
        InputGradientRegularized(two_inputs(), 0.1, inputs=["c"])
    with pytest.raises(ValueError, match="of which some have no gradient"):
        InputGradientRegularized(tokens(), 0.1, inputs=[0])


class Subclassed(keras.Model):
    """Of which nobody knows what it takes before it is called."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def call(self, x):
        return self.model(x)


def subclassed(model, x):
    wrapped = Subclassed(model)
    wrapped(x[:1] if not isinstance(x, list) else [a[:1] for a in x])
    return wrapped


REFUSALS = {
    "tokens": (tokens, lambda m: InputGradientRegularized(subclassed(m, TOKENS), 0.1), TOKENS, "mse"),
    "two inputs": (two_inputs, lambda m: AdversarialTraining(subclassed(m, [X, X]), FGSM(0.1)), [X, X], "mse"),
    "target": (smooth, lambda m: InputGradientRegularized(m, 0.1, target=lambda y, p: ops.sum(p)), X, "mse"),
    "one number": (
        smooth,
        lambda m: InputGradientRegularized(m, 0.1, method="finite_difference"),
        X,
        lambda y, y_pred: ops.mean(ops.square(y - y_pred)),
    ),
}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("tokens", "fit"),
        ("two inputs", "fit"),
        ("one number", "fit"),
        *(("target", way) for way in ("fit", "evaluate", "train_on_batch", "validation")),
    ],
)
def test_a_refusal_leaves_the_model_trained(name, way):
    make, wrap, x, loss = REFUSALS[name]
    model = make()
    model.compile(keras.optimizers.Adam(0.01), "mse", **EAGERLY)
    model.fit(x, Y, batch_size=BATCH, verbose=0)
    before = state(model)
    wrapped = wrap(model)
    wrapped.compile(keras.optimizers.Adam(0.01), loss, **EAGERLY)
    options = {} if "batch" in way else {"batch_size": BATCH, "verbose": 0}
    with pytest.raises(ValueError, match="Received: "):
        if way == "validation":
            wrapped.fit(x, Y, validation_data=(x, Y), **options)
        else:
            getattr(wrapped, way)(x, Y, **options)
    assert_same(before, state(model))
    assert all(np.isfinite(v).all() for v in state(wrapped))
    assert_unharmed(model)
    model.fit(x, Y, batch_size=BATCH, verbose=0)


# --- whatever else ends a step ---


def with_penalty_layer():
    inputs = keras.Input((D,))
    features = keras.Sequential([layers.Dense(4, activation="tanh"), Failing()])
    model = keras.Model(
        inputs, layers.Dense(1)(kg.layers.InputGradientPenalty(features, 0.1, target="outputs")(inputs))
    )
    model.compile(keras.optimizers.Adam(0.01), "mse", **EAGERLY)
    return model


def wrapped_in(wrap, optimizer=None):
    def make():
        wrapped = wrap(smooth())
        wrapped.compile(optimizer() if optimizer else keras.optimizers.Adam(0.01), "mse", metrics=["mae"], **EAGERLY)
        return wrapped

    return make


TRAINED = {
    "plain": smooth,
    "layer": with_penalty_layer,
    "regularized": wrapped_in(lambda m: InputGradientRegularized(m, 0.1, every=2)),
    "finite differences": wrapped_in(lambda m: InputGradientRegularized(m, 0.1, method="finite_difference")),
    "adversarial": wrapped_in(lambda m: AdversarialTraining(m, FGSM(0.1))),
    "second order": wrapped_in(SecondOrder, lambda: kg.optimizers.NewtonCG(max_iterations=3)),
}
# Trained by Keras alone, which eagerly has moved statistics and seeds by the time that a layer raises.
UNGUARDED = ("plain", "layer") if keras.config.backend() != "jax" else ()
MONITORS = {
    "newton": lambda: NewtonStep((X, Y), damping=1.0, max_iterations=3, every=1),
    "curvature": lambda: CurvatureMonitor((X, Y), every=1),
    "gradients": lambda: GradientMonitor((X, Y), every=1),
    "jacobian": lambda: BatchJacobianMonitor(X, every=1),
    "robustness": lambda: RobustnessMonitor((X, (Y > 0).astype("int32")), every=1, epsilons=[0.1], clip=None),
}


def failing_of(model):
    return next(part for part in model._flatten_layers() if isinstance(part, Failing))


@pytest.mark.parametrize(
    ("name", "error"),
    [("plain", KeyboardInterrupt("Ctrl-C")), ("regularized", KeyboardInterrupt("Ctrl-C"))]
    + [(name, RuntimeError("the user's")) for name in TRAINED],
)
def test_an_error_in_the_first_step_leaves_everything(name, error):
    model = TRAINED[name]()
    if isinstance(error, RuntimeError) and name != "second order":
        # So that the optimizer has something to lose; what `SecondOrder` compiles is kept, and not traced again.
        model.fit(X, Y, batch_size=BATCH, verbose=0)
        model.make_train_function(force=True)
    before = {id(v): ops.convert_to_numpy(v).copy() for v in model.variables}
    failing = failing_of(model)
    failing.error = error
    with pytest.raises(type(error), match=str(error)):
        model.fit(X, Y, batch_size=BATCH, verbose=0)
    failing.error = None
    kept = model.trainable_variables if name in UNGUARDED else model.variables
    assert_same([ops.convert_to_numpy(v) for v in kept], [before[id(v)] for v in kept])
    assert all(np.isfinite(v).all() for v in state(model))
    history = model.fit(X, Y, batch_size=BATCH, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert any((before[id(v)] != ops.convert_to_numpy(v)).any() for v in model.trainable_variables)


class Stop(keras.callbacks.Callback):
    """Notes the weights at each call, and raises at one of them."""

    def __init__(self, at, where):
        super().__init__()
        self.at, self.where, self.weights = at, where, None

    def on_train_batch_begin(self, batch, logs=None):
        self._note("begin", batch)

    def on_train_batch_end(self, batch, logs=None):
        self._note("end", batch)

    def _note(self, where, batch):
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
        self.weights = copy.deepcopy(self.model.get_weights())
        if self.where == where and batch == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("at", "where"), [(2, "end")])
@pytest.mark.parametrize("name", ["plain", "regularized", "second order"])
def test_an_interrupt_between_steps_leaves_the_last_step(name, at, where):
    model = TRAINED[name]()
    stop = Stop(at, where)
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, Y, batch_size=BATCH, verbose=0, callbacks=[stop])
    assert_same(stop.weights, model.get_weights())
    model.fit(X, Y, batch_size=BATCH, verbose=0)


@pytest.mark.parametrize("name", ["plain", "regularized", "second order"])
def test_data_that_fail_leave_the_last_step(name):
    model = TRAINED[name]()
    seen = Stop(1, "never")

    def batches():
        yield X[:BATCH], Y[:BATCH]
        yield X[:BATCH], Y[:BATCH]
        raise OSError("the disk")

    with pytest.raises(Exception, match="the disk"):  # noqa: B017 - TensorFlow wraps it
        model.fit(batches(), verbose=0, callbacks=[seen])
    assert_same(seen.weights, model.get_weights())
    model.fit(X, Y, batch_size=BATCH, verbose=0)


@pytest.mark.parametrize("name", MONITORS)
def test_an_error_beside_a_callback_leaves_everything(name):
    model = smooth()
    model.fit(X, Y, batch_size=BATCH, verbose=0)
    model.make_train_function(force=True)
    weights = [ops.convert_to_numpy(v).copy() for v in model.trainable_variables]
    failing = failing_of(model)

    class Begin(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            failing.error = RuntimeError("the user's")

    with pytest.raises(RuntimeError, match="the user's"):
        model.fit(X, Y, batch_size=BATCH, verbose=0, callbacks=[MONITORS[name](), Begin()])
    failing.error = None
    assert_same(weights, [ops.convert_to_numpy(v) for v in model.trainable_variables])
    assert_unharmed(model)


@pytest.mark.parametrize("name", ["newton", "gradients"])
def test_an_error_after_a_callback_leaves_the_last_step(name):
    model = smooth()
    stop = Stop(1, "end")
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, Y, batch_size=BATCH, verbose=0, callbacks=[MONITORS[name](), stop])
    assert_same(stop.weights, model.get_weights())
    assert_unharmed(model)
