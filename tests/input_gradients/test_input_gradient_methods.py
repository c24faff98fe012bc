"""Every method, target and norm of `InputGradientRegularized` in Keras' own loops, against NumPy.

`tests/input_gradients/tanh_network.py` holds the reference: a tanh network whose input gradients are written out.
"""

import json
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_gradtools import backend as kernels
from keras_gradtools.models import InputGradientRegularized
from tests import input_gradients as numpy_network
from tests.cases import KERAS, central_differences
from tests.input_gradients.tanh_network import (
    NETWORK,
    D,
    H,
    K,
    N,
    Reference,
    X,
    Y,
    all_outputs,
    cross_entropy,
    drawn_mixtures,
    keras_margin,
    margin,
    network,
    sgd_step,
)

RNG = np.random.default_rng(3)
WEIGHT, RATE = 0.3, 0.02
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
SAMPLE_WEIGHT = RNG.uniform(0.2, 2.0, N).astype("float32")
EAGER = {"run_eagerly": True}
# What takes the least time for a step or two: on JAX, eager operations are compiled one by one.
QUICK = {} if keras.config.backend() == "jax" else EAGER
SLOW = pytest.mark.slow
TARGETS = {"loss": ("loss", cross_entropy()), "outputs": ("outputs", all_outputs()), "margin": (keras_margin, margin())}

# The penalty before each of three steps of gradient descent, as `tests/input_gradients/tanh_network.py` computes it:
# numbers that every backend is held to, and the reference as well.
PENALTIES = {
    ("exact", "loss", 1): (1.3789174, 1.3271628, 1.2775151),
    ("exact", "loss", 2): (0.48083526, 0.4734942, 0.46636618),
    ("exact", "loss", "inf"): (0.3157728, 0.31170357, 0.30774586),
    ("exact", "outputs", 1): (20.812437, 13.811115, 10.289453),
    ("exact", "outputs", 2): (2.5914631, 2.47426, 2.3649858),
    ("exact", "outputs", "inf"): (0.87708177, 0.85685476, 0.83729661),
    ("exact", "margin", 1): (6.2405942, 5.373636, 4.6695913),
    ("exact", "margin", 2): (2.146385, 2.0303783, 1.9233123),
    ("exact", "margin", "inf"): (1.4351179, 1.3674458, 1.3044442),
    ("finite_difference", "loss", 1): (1.4451509, 1.3885256, 1.33429),
    ("finite_difference", "loss", 2): (0.49787433, 0.49028126, 0.48292731),
    ("finite_difference", "loss", "inf"): (0.33101422, 0.32646714, 0.32205699),
    ("finite_difference", "outputs", 1): (19.69823, 13.337391, 10.017438),
    ("finite_difference", "outputs", 2): (2.4771333, 2.3665577, 2.2635586),
    ("finite_difference", "outputs", "inf"): (0.857572, 0.83791352, 0.81890701),
    ("finite_difference", "margin", 1): (6.3267713, 5.4617583, 4.7581641),
    ("finite_difference", "margin", 2): (2.1812602, 2.0628787, 1.9533858),
    ("finite_difference", "margin", "inf"): (1.4245645, 1.357519, 1.2950785),
}
# With all outputs and no draw, random projections are the exact Jacobian.
PENALTIES |= {
    ("random_projection", *key[1:]): PENALTIES[key] for key in list(PENALTIES) if key[:2] == ("exact", "outputs")
}


def regularized(model=None, weight=WEIGHT, rate=RATE, loss=LOSS, compiled=None, optimizer=None, **options):
    wrapped = InputGradientRegularized(network() if model is None else model, weight, **options)
    wrapped.compile(optimizer or keras.optimizers.SGD(rate), loss, **(compiled or {}))
    return wrapped


def fit(wrapped, epochs=1, x=X, y=Y, **kwargs):
    """A step for each epoch, or as many as `batch_size` says: what is logged for each."""
    return wrapped.fit(x, y, **{"batch_size": len(Y), "shuffle": False, "verbose": 0, **kwargs}, epochs=epochs).history


def evaluate(wrapped, x=X, y=Y, **kwargs):
    return wrapped.evaluate(x, y, **{"batch_size": len(Y), "verbose": 0, "return_dict": True, **kwargs})


def train(wrapped, x=X, y=Y, **kwargs):
    # Keras 3.10 logs the mean over all steps since the last reset.
    wrapped.reset_metrics()
    return wrapped.train_on_batch(x, y, return_dict=True, **kwargs)


def close(actual, desired, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(np.asarray(actual, "float64"), desired, rtol=rtol, atol=atol)


def assert_stepped(before, model, step, rate=RATE, rtol=2e-4, atol=2e-4):
    """Every weight of `model` moved from `before` as the reference says, to the precision of the difference."""
    for was, now, expected in zip(before, model.get_weights(), step.after, strict=True):
        close((was.astype("float64") - now) / rate, (was - expected) / rate, rtol, atol)


def reference_of(method, target, norm=2, **options):
    return Reference(TARGETS[target][1], method, norm, **options)


# --- the value and the step ---

# Each method, target and norm is in one of these; all of them take a minute on JAX, which compiles each.
COVERING = [
    ("exact", "loss", 1),
    ("exact", "outputs", 2),
    ("exact", "margin", "inf"),
    ("finite_difference", "loss", 2),
    ("finite_difference", "outputs", "inf"),
    ("finite_difference", "margin", 1),
    ("random_projection", "outputs", 1),
]


@pytest.mark.parametrize(
    ("method", "target", "norm"),
    [key if key in COVERING else pytest.param(*key, marks=SLOW) for key in PENALTIES],
)
def test_three_steps_of_fit(method, target, norm):
    reference = reference_of(method, target, norm)
    steps, weights = [], NETWORK
    for _ in range(3):
        steps.append(sgd_step(reference, weights, WEIGHT, RATE))
        weights = steps[-1].after
    stored = PENALTIES[method, target, norm]
    close([s.penalty for s in steps], stored, rtol=1e-7)

    wrapped = regularized(target=TARGETS[target][0], norm=norm, method=method, projections=-1, compiled=QUICK)
    history = fit(wrapped)
    assert_stepped(NETWORK, wrapped.model, steps[0])
    for name, values in fit(wrapped, 2).items():
        history[name] += values
    close(history["input_gradient_penalty"], stored)
    close(history["input_gradient_norm"], [s.norm for s in steps])
    close(history["loss"], [s.loss for s in steps])


def compilations():
    """What `compile` can be told on this backend besides `run_eagerly`; JAX always compiles, and torch not twice."""
    return {"tensorflow": [{}, {"jit_compile": True}], "jax": [{"jit_compile": True}], "torch": [{}]}[
        keras.config.backend()
    ]


@pytest.mark.parametrize("compiled", compilations(), ids=str)
@pytest.mark.parametrize(
    ("method", "target", "options"),
    [
        ("exact", "loss", {"norm": 2, "squared": False, "center": 0.5}),
        ("finite_difference", "margin", {"norm": 2, "squared": False, "center": 0.5, "step_size": 0.25}),
        pytest.param("finite_difference", "loss", {"norm": "inf", "center": 1.0}, marks=SLOW),
    ],
)
def test_a_step_when_compiled(method, target, options, compiled):
    step = sgd_step(reference_of(method, target, **options), NETWORK, WEIGHT, RATE)
    wrapped = regularized(target=TARGETS[target][0], method=method, compiled=compiled, **options)
    logs = evaluate(wrapped)
    history = fit(wrapped)
    for name, value in (("input_gradient_penalty", step.penalty), ("input_gradient_norm", step.norm)):
        close([logs[name], history[name][0]], value)
    close([logs["loss"], history["loss"][0]], step.loss)
    assert_stepped(NETWORK, wrapped.model, step)


@pytest.mark.parametrize(
    ("method", "every"),
    [
        ("random_projection", 2),
        ("finite_difference", 1),
        pytest.param("random_projection", 1, marks=SLOW),
        pytest.param("finite_difference", 2, marks=SLOW),
    ],
)
def test_projections_that_are_drawn(method, every):
    # Which mixtures a seed stands for differs between backends; what is made of them does not.
    wrapped = regularized(target="outputs", method=method, projections=2, seed=5, every=every)
    seeds = keras.random.SeedGenerator(5)
    before = NETWORK
    for number in range(3 if every > 1 else 1):
        reference = Reference(drawn_mixtures(seeds, 2), method)
        weight = 0.0 if number % every else WEIGHT * every
        step = sgd_step(reference, before, weight, RATE)
        logs = train(wrapped)
        close(logs["loss"], step.loss)
        if weight:
            close([logs["input_gradient_penalty"], logs["input_gradient_norm"]], [step.penalty, step.norm])
        assert_stepped(before, wrapped.model, step)
        before = wrapped.model.get_weights()


def test_projections_of_two_outputs_are_drawn_together():
    inputs = keras.Input((D,))
    model = keras.Model(inputs, [layers.Dense(2, use_bias=False)(inputs), layers.Dense(1, use_bias=False)(inputs)])
    a, b = RNG.normal(size=(D, 2)), RNG.normal(size=(D, 1))
    model.set_weights([a, b])
    wrapped = regularized(
        model, loss=["mse", "mse"], target="outputs", method="random_projection", seed=5, compiled=QUICK
    )
    seeds = keras.random.SeedGenerator(5)
    v = ops.convert_to_numpy(keras.random.normal((1, N, 3), seed=seeds))[0].astype("float64")
    v *= np.sqrt(3) / np.linalg.norm(v, axis=1, keepdims=True)
    g = v @ np.concatenate([a, b], axis=1).T
    logs = train(wrapped, X, [np.zeros((N, 2)), np.zeros((N, 1))])
    close(logs["input_gradient_penalty"], np.mean((g**2).sum(axis=1)))
    close(logs["input_gradient_norm"], np.mean(np.linalg.norm(g, axis=1)))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["random_projection", "finite_difference"])
def test_random_projections_are_unbiased(method):
    # Of one example many times, so that the mean over the batch is the mean over as many draws.
    count = 2048
    x, y = np.repeat(X[:1], count, axis=0), np.repeat(Y[:1], count)
    wrapped = regularized(target="outputs", method=method, projections=2, step_size=1e-2, seed=1, compiled=QUICK)
    j = numpy_network.jacobian([w.astype("float64") for w in NETWORK], X[:1])[0]
    v = np.random.default_rng(0).normal(size=(10000, K))
    v *= np.sqrt(K) / np.linalg.norm(v, axis=1, keepdims=True)
    deviation = np.std(((v @ j) ** 2).sum(axis=1)) / np.sqrt(2 * count)
    expected = (j**2).sum()
    assert deviation < 0.02 * expected
    # Finite differences of a curved function are off by about the size of a step.
    close(evaluate(wrapped, x, y)["input_gradient_penalty"], expected, rtol=0, atol=5 * deviation + 0.01 * expected)


@pytest.mark.slow
def test_seeds():
    def penalties(seed):
        wrapped = regularized(target="outputs", method="random_projection", seed=seed, compiled=QUICK)
        return fit(wrapped, 2)["input_gradient_penalty"]

    first = penalties(1)
    np.testing.assert_array_equal(first, penalties(1))
    assert abs(first[0] - penalties(2)[0]) > 1e-3


# --- when it counts, and how much ---

# For a loss of x . w the gradient is w everywhere, its squared norm |w|^2, and a step of gradient descent known.
LINEAR = np.array([[1.0], [-2.0], [0.5], [1.5]], "float32")


@keras.saving.register_keras_serializable(package="tests_input_gradient_methods")
def first_output(y, y_pred):
    return y_pred[:, 0]


@keras.saving.register_keras_serializable(package="tests_input_gradient_methods")
class Ramp(keras.optimizers.schedules.LearningRateSchedule):
    """Steps of 0.1, from 0.1 on."""

    def __call__(self, step):
        return 0.1 * (ops.cast(step, "float32") + 1.0)

    def get_config(self):
        return {}


def linear(**kwargs):
    model = keras.Sequential([keras.Input((D,)), layers.Dense(1, use_bias=False, **kwargs)])
    model.set_weights([LINEAR])
    return model


def descent(weights, every=1, x=X, rate=RATE):
    """The loss and the penalty before each step, and w after all; `weights` of the penalty at each."""
    w, losses, penalties = LINEAR.astype("float64"), [], []
    for number, weight in enumerate(weights):
        batch = x[number] if x.ndim == 3 else x
        factor = 0.0 if number % every else weight * every
        penalties.append((w**2).sum())
        losses.append(np.mean(batch @ w) + factor * penalties[-1])
        w = w - rate * (batch.mean(axis=0)[:, None] + 2 * factor * w)
    return np.array(losses), np.array(penalties), w


@pytest.mark.parametrize(
    ("weight", "every", "method"),
    [
        (Ramp(), 3, "finite_difference"),
        (0.2, 2, "exact"),
        pytest.param(Ramp(), 1, "exact", marks=SLOW),
        pytest.param(0.2, 3, "finite_difference", marks=SLOW),
    ],
)
def test_schedules_and_lazy_steps_resume_after_loading(weight, every, method, tmp_path):
    at = [0.1 * (i + 1) if isinstance(weight, Ramp) else weight for i in range(8)]
    losses, penalties, after = descent(at[:7], every)
    wrapped = regularized(linear(), weight, loss=first_output, every=every, method=method)
    history = fit(wrapped, 4)
    # Evaluation always measures, with the weight that training has come to, and is no training step.
    logs = evaluate(wrapped)
    close(logs["input_gradient_penalty"], penalties[4])
    close(logs["loss"], np.mean(X @ descent(at[:4], every)[2]) + at[4] * penalties[4])
    wrapped.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert int(loaded._steps) == 4
    for name, values in fit(loaded, 3).items():
        history[name] += values
    due = np.arange(7) % every == 0
    close(history["loss"], losses)
    close(np.array(history["input_gradient_penalty"])[due], penalties[due])
    close(np.array(history["input_gradient_norm"])[due], np.sqrt(penalties[due]))
    close(loaded.model.get_weights()[0], after)
    close(evaluate(loaded)["input_gradient_penalty"], (after**2).sum())


def test_logs_are_means_over_the_examples_of_the_due_steps():
    wrapped = regularized(linear(), 0.2, loss=first_output, every=2, compiled=QUICK)
    history = fit(wrapped, batch_size=3)
    w, penalties = LINEAR.astype("float64"), []
    for number, batch in enumerate((X[:3], X[3:6], X[6:])):
        penalties.append((w**2).sum())
        w = w - RATE * (batch.mean(axis=0)[:, None] + (0.0 if number % 2 else 0.8 * w))
    close(history["input_gradient_penalty"], [(3 * penalties[0] + 2 * penalties[2]) / 5])
    close(wrapped.model.get_weights()[0], w)


@pytest.mark.parametrize(("method", "frozen"), [("exact", False), ("finite_difference", True)])
def test_lazy_steps_of_a_network(method, frozen):
    wrapped = regularized(method=method, every=2, frozen_statistics=frozen)
    before = NETWORK
    for factor in (2.0, 0.0, 2.0):
        step = sgd_step(reference_of(method, "loss"), before, factor * WEIGHT, RATE)
        logs = train(wrapped)
        close(logs["loss"], step.loss)
        if factor:
            close([logs["input_gradient_penalty"], logs["input_gradient_norm"]], [step.penalty, step.norm])
        assert_stepped(before, wrapped.model, step)
        before = wrapped.model.get_weights()


@pytest.mark.parametrize("method", ["finite_difference", "random_projection"])
def test_weight_zero_measures_only(method):
    target = "outputs" if method == "random_projection" else "loss"
    step = sgd_step(reference_of(method, target), NETWORK, 0.0, RATE)
    wrapped = regularized(weight=0, target=target, method=method, projections=-1, compiled=QUICK)
    history = fit(wrapped)
    close(history["input_gradient_penalty"], [step.penalty])
    close(history["loss"], [step.loss])
    assert_stepped(NETWORK, wrapped.model, step)


def test_another_weight_counts_after_compiling_again():
    wrapped = regularized(linear(), 0.2, loss=first_output, compiled=QUICK)
    wrapped.weight = 0.5
    wrapped.compile(keras.optimizers.SGD(RATE), first_output, **QUICK)
    losses, _, after = descent([0.5])
    close(fit(wrapped)["loss"], losses)
    close(wrapped.model.get_weights()[0], after)


# --- layers with state ---


class Observed(layers.Layer):
    """Counts its calls, keeps a metric of its input and adds a loss."""

    def build(self, shape):
        self.calls = self.add_weight(name="calls", shape=(), dtype="int32", initializer="zeros", trainable=False)
        self.seen = keras.metrics.Mean(name="seen")

    def call(self, x):
        self.calls.assign_add(1)
        self.seen.update_state(ops.mean(x))
        self.add_loss(0.1 * ops.mean(ops.square(x)))
        return x


GAMMA, BETA, CENTER, VARIANCE = (RNG.uniform(0.5, 1.5, D).astype("float32") for _ in range(4))


def normalized(x, mean=None, variance=None):
    mean, variance = (x.mean(axis=0), x.var(axis=0)) if mean is None else (mean, variance)
    return (x - mean) / np.sqrt(variance + 1e-3) * GAMMA + BETA


def normalization_penalty(method, frozen, h=0.1):
    """For the loss z^2 (or, projected, z itself) of z = w . normalized(x)."""
    x = X.astype("float64")
    at = (CENTER, VARIANCE) if frozen else ()

    def losses(x):
        return (normalized(x, *at) @ LINEAR)[:, 0] ** 2

    if method == "random_projection":
        g = np.broadcast_to(GAMMA / np.sqrt(VARIANCE + 1e-3) * LINEAR[:, 0], (N, D))
    else:
        g = central_differences(lambda v: losses(v[0]).sum(), [x])[0]
    length = np.linalg.norm(g, axis=1)
    if method == "finite_difference":
        length = (losses(x + h * g / length[:, None]) - losses(x)) / h
    return np.mean(length**2)


@pytest.mark.parametrize(
    ("method", "frozen"),
    [
        ("exact", False),
        ("exact", True),
        ("finite_difference", False),
        ("finite_difference", True),
        ("random_projection", True),
    ],
)
def test_a_step_changes_the_state_of_layers_once(method, frozen, backend):
    observed, normalization = Observed(), layers.BatchNormalization(momentum=0.9)
    model = keras.Sequential([keras.Input((D,)), observed, normalization, layers.Dense(1, use_bias=False)])
    normalization.set_weights([GAMMA, BETA, CENTER, VARIANCE])
    model.layers[-1].set_weights([LINEAR])
    wrapped = regularized(
        model,
        loss=lambda y, y_pred: y_pred[:, 0] ** 2,
        target="outputs" if method == "random_projection" else "loss",
        method=method,
        frozen_statistics=frozen,
        compiled={} if method == "finite_difference" else QUICK,
    )
    logs = train(wrapped)
    penalty = normalization_penalty(method, frozen)
    close(logs["input_gradient_penalty"], penalty, rtol=2e-5)
    # The loss itself goes by the statistics of the batch either way.
    loss = np.mean((normalized(X.astype("float64")) @ LINEAR) ** 2)
    close(logs["loss"], loss + WEIGHT * penalty + 0.1 * np.mean(X**2), rtol=2e-5)
    close(normalization.moving_mean, 0.9 * CENTER + 0.1 * X.mean(axis=0))
    close(normalization.moving_variance, 0.9 * VARIANCE + 0.1 * X.var(axis=0))
    assert int(observed.calls) == 1
    if backend != "jax":  # where Keras itself drops what a layer tells its metric
        assert float(observed.seen.count) == 1
        close(logs["seen"], X.mean())
    assert normalization.trainable and normalization._trainable


@keras.saving.register_keras_serializable(package="tests_input_gradient_methods")
class UnseededDropout(layers.Layer):
    """Draws from the global seed of Keras."""

    def call(self, x, training=None):
        return keras.random.dropout(x, 0.5) if training else x


def torch_dropout():
    torch = pytest.importorskip("torch")
    return layers.TorchModuleWrapper(torch.nn.Dropout(0.5), output_shape=(None, D))


@pytest.mark.parametrize(
    ("make", "method", "frozen"),
    [
        (lambda: layers.Dropout(0.5, seed=3), "finite_difference", False),
        (lambda: layers.Dropout(0.5), "finite_difference", False),
        (lambda: layers.Dropout(0.5), "exact", True),
        (UnseededDropout, "finite_difference", False),
        (UnseededDropout, "exact", True),
        (torch_dropout, "finite_difference", False),
    ],
    ids=["seeded", "dropout", "dropout-frozen", "global", "global-frozen", "torch"],
)
def test_dropout_draws_the_same_mask_again(make, method, frozen, backend):
    if make is torch_dropout and backend != "torch":
        pytest.skip("a torch module runs on torch only")
    # With z = 2 mask . x at x = 1, the gradient of the loss z is 2 mask, and its squared norm 2 z.
    model = keras.Sequential([keras.Input((D,)), make(), layers.Dense(1, use_bias=False)])
    model.layers[-1].set_weights([np.ones((D, 1))])
    # Keras refuses its global seed in what JAX compiles.
    compiled = EAGER if isinstance(model.layers[0], UnseededDropout) else {}
    wrapped = regularized(
        model, loss=first_output, method=method, frozen_statistics=frozen, compiled=compiled, rate=0.0
    )
    losses = set()
    for _ in range(4):
        logs = train(wrapped, np.ones((N, D), "float32"))
        loss = logs["loss"] - WEIGHT * logs["input_gradient_penalty"]
        close(logs["input_gradient_penalty"], 2 * loss, rtol=1e-4)
        losses.add(round(float(loss), 3))
    # Not the same mask in every step, as without a penalty; but on JAX Keras keeps its global seed where it was.
    assert (len(losses) > 1) == (make is not UnseededDropout or backend != "jax")


# --- losses, weights, masks, inputs ---


@pytest.mark.parametrize("by", ["sample", "class"])
def test_weights_of_examples_in_finite_differences(by):
    class_weight = {0: 1.0, 1: 2.0, 2: 0.5}
    w = SAMPLE_WEIGHT if by == "sample" else np.array([class_weight[c] for c in Y])
    step = sgd_step(reference_of("finite_difference", "loss"), NETWORK, WEIGHT, RATE, w=w)
    wrapped = regularized(method="finite_difference", compiled=QUICK)
    given = {"sample_weight": w} if by == "sample" else {"class_weight": class_weight}
    history = fit(wrapped, **given)
    close(history["input_gradient_penalty"], [step.penalty])
    close(history["input_gradient_norm"], [step.norm])
    close(history["loss"], [step.loss])
    assert_stepped(NETWORK, wrapped.model, step)


def test_finite_differences_of_several_losses():
    inputs = keras.Input((D,))
    a, b = layers.Dense(1, use_bias=False, name="a"), layers.Dense(1, use_bias=False, name="b")
    model = keras.Model(inputs, [a(inputs), b(inputs)])
    a.set_weights([LINEAR])
    b.set_weights([LINEAR[::-1]])
    wrapped = regularized(
        model,
        loss={"a": "mse", "b": "mse"},
        method="finite_difference",
        compiled={"loss_weights": {"a": 1.0, "b": 0.5}, "metrics": {"a": ["mse"]}, **QUICK},
    )
    x, h = X.astype("float64"), 0.1

    def losses(x):
        return ((x @ LINEAR) ** 2 + 0.5 * (x @ LINEAR[::-1]) ** 2)[:, 0]

    g = 2 * (x @ LINEAR) * LINEAR[:, 0] + (x @ LINEAR[::-1]) * LINEAR[::-1, 0]
    quotients = (losses(x + h * g / np.linalg.norm(g, axis=1, keepdims=True)) - losses(x)) / h
    penalty = np.mean(SAMPLE_WEIGHT * quotients**2)
    zeros = np.zeros((N, 1), "float32")
    logs = train(wrapped, X, [zeros, zeros], sample_weight=SAMPLE_WEIGHT)
    close(logs["input_gradient_penalty"], penalty)
    close(logs["loss"], np.mean(SAMPLE_WEIGHT * losses(x)) + WEIGHT * penalty)
    close(logs["a_loss"], np.mean(SAMPLE_WEIGHT * (x @ LINEAR)[:, 0] ** 2))
    close(logs["a_mse"], np.mean((x @ LINEAR) ** 2))


@pytest.mark.parametrize(
    ("method", "target"),
    [("exact", "outputs"), ("finite_difference", "loss"), ("finite_difference", "outputs")],
)
def test_masked_steps_do_not_count(method, target):
    t, h = 3, 0.1
    x = RNG.normal(size=(N, t, D)).astype("float32")
    valid = np.arange(t) < (np.arange(N) % t + 1)[:, None]
    x[~valid] = 0.0
    w = RNG.normal(size=(D, K)).astype("float32")
    model = keras.Sequential([keras.Input((t, D)), layers.Masking(), layers.Dense(K, use_bias=False)])
    model.set_weights([w])
    y = RNG.normal(size=(N, t, K)).astype("float32")
    # Keras divides by the number of valid steps in the batch, and the loss is a mean of N contributions.
    factor = N / (valid.sum() * K)

    def losses(x):
        return factor * ((x @ w - y) ** 2 * valid[..., None]).sum(axis=(1, 2))

    if target == "outputs":
        penalty = np.mean(valid.sum(axis=1) * (w**2).sum())
    else:
        g = 2 * factor * ((x @ w - y) * valid[..., None]) @ w.T
        shift = h * g / np.sqrt((g**2).sum(axis=(1, 2), keepdims=True))
        penalty = np.mean(((losses(x + shift) - losses(x)) / h) ** 2)
    wrapped = regularized(model, loss="mse", target=target, method=method, projections=-1, compiled=QUICK)
    logs = train(wrapped, x, y)
    close(logs["input_gradient_penalty"], penalty, rtol=2e-5)
    close(logs["loss"], losses(x).mean() + WEIGHT * penalty, rtol=2e-5)


@pytest.mark.parametrize(
    ("method", "chosen", "which"),
    [
        ("exact", "a", "a"),
        ("exact", [0, "b"], "ab"),
        ("finite_difference", None, "ab"),
        ("finite_difference", ["b"], "b"),
    ],
)
def test_dict_inputs_and_a_choice_of_them(method, chosen, which):
    inputs = {"a": keras.Input((D,), name="a"), "b": keras.Input((2,), name="b")}
    p, q = LINEAR, np.array([[3.0], [4.0]], "float32")
    z = layers.Dense(1, use_bias=False, name="p")(inputs["a"]) + layers.Dense(1, use_bias=False, name="q")(inputs["b"])
    model = keras.Model(inputs, z)
    model.get_layer("p").set_weights([p])
    model.get_layer("q").set_weights([q])
    z = (X @ p + X[:, :2] @ q).astype("float64")
    # The loss z^2 has the gradient 2 z w, and by finite differences z grows by h |w| away from zero.
    length = np.sqrt((p**2).sum() * ("a" in which) + 25 * ("b" in which))
    slope = 2 * np.abs(z) * length
    if method == "finite_difference":
        slope += 0.1 * length**2
    wrapped = regularized(model, loss="mse", method=method, inputs=chosen, compiled=QUICK)
    logs = train(wrapped, {"a": X, "b": X[:, :2]}, np.zeros((N, 1), "float32"))
    close(logs["input_gradient_penalty"], np.mean(slope**2))
    close(logs["loss"], np.mean(z**2) + WEIGHT * np.mean(slope**2))


def test_an_input_that_is_not_there():
    with pytest.raises(ValueError, match="an input in `inputs` that the model does not have. Received: 'pixels' of"):
        regularized(inputs="pixels", compiled=QUICK)


# --- Keras' loops ---


@pytest.fixture
def half_precision():
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("method", ["exact", "finite_difference", pytest.param("random_projection", marks=SLOW)])
def test_mixed_precision_with_a_scaled_loss(method, half_precision):
    target = "outputs" if method == "random_projection" else "loss"
    reference = reference_of(method, target, step_size=0.5)
    step = sgd_step(reference, NETWORK, WEIGHT, RATE)
    wrapped = regularized(target=target, method=method, step_size=0.5, projections=-1)
    assert isinstance(wrapped.optimizer, keras.optimizers.LossScaleOptimizer)
    wrapped.optimizer.initial_scale = 1024.0
    history = fit(wrapped)
    close(history["input_gradient_penalty"], [step.penalty], rtol=1e-2)
    close(history["loss"], [step.loss], rtol=1e-2)
    assert_stepped(NETWORK, wrapped.model, step, rtol=2e-2, atol=2e-2)


def test_accumulated_gradients():
    wrapped = regularized(optimizer=keras.optimizers.SGD(RATE, gradient_accumulation_steps=2))
    halves = [
        sgd_step(Reference(cross_entropy(y)), NETWORK, WEIGHT, RATE, x=x, loss=cross_entropy(y))
        for x, y in ((X[: N // 2], Y[: N // 2]), (X[N // 2 :], Y[N // 2 :]))
    ]
    train(wrapped, X[: N // 2], Y[: N // 2])
    for was, now in zip(NETWORK, wrapped.model.get_weights(), strict=True):
        np.testing.assert_array_equal(was, now)
    train(wrapped, X[N // 2 :], Y[N // 2 :])
    mean = [(a + b) / 2 for a, b in zip(halves[0].after, halves[1].after, strict=True)]
    assert_stepped(NETWORK, wrapped.model, halves[0]._replace(after=mean))


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
@pytest.mark.usefixtures("needs_steps_per_execution")
def test_several_steps_in_one_execution(method):
    x = X.reshape(4, 2, D)
    _, penalties, after = descent([0.1, 0.2, 0.3, 0.4], every=2, x=x)
    wrapped = regularized(
        linear(), Ramp(), loss=first_output, method=method, every=2, compiled={"steps_per_execution": 2}
    )
    history = fit(wrapped, batch_size=2)
    close(wrapped.model.get_weights()[0], after)
    close(history["input_gradient_penalty"], [penalties[::2].mean()])


def test_the_wrapped_model_is_shared():
    model = network()
    wrapped = regularized(model, compiled=QUICK)
    assert wrapped.model is model
    train(wrapped)
    assert not np.allclose(model.get_weights()[0], NETWORK[0])
    close(wrapped.predict(X, verbose=0), model.predict(X, verbose=0))
    # What is set in one is seen in the other.
    model.set_weights(NETWORK)
    close(evaluate(wrapped)["input_gradient_penalty"], PENALTIES["exact", "loss", 2][0])


# --- the choice of a method ---


def once_differentiable_tanh(x):
    """`tanh`, in the words of the framework, whose derivative cannot be differentiated."""
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        @tf.custom_gradient
        def slope(u, y):
            def refuse(*_):
                raise LookupError("no second derivative")

            return u * (1 - y**2), refuse

        @tf.custom_gradient
        def tanh(x):
            y = tf.tanh(x)
            return y, lambda u: slope(u, y)

        return tanh(x)
    if keras.config.backend() == "jax":
        import jax

        @jax.custom_vjp
        def slope(u, y):
            return u * (1 - y**2)

        def refuse(*_):
            raise LookupError("no second derivative")

        slope.defvjp(lambda u, y: (slope(u, y), None), refuse)
        tanh = jax.custom_vjp(jax.numpy.tanh)
        tanh.defvjp(lambda x: (jax.numpy.tanh(x),) * 2, lambda y, u: (slope(u, y),))
        return tanh(x)
    import torch

    class Tanh(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = torch.tanh(x)
            ctx.save_for_backward(y)
            return y

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, u):
            return u * (1 - ctx.saved_tensors[0] ** 2)

    return Tanh.apply(x)


@keras.saving.register_keras_serializable(package="tests_input_gradient_methods")
class OnceDifferentiable(layers.Layer):
    def call(self, x):
        return once_differentiable_tanh(x)

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, x.dtype)


def test_a_layer_without_a_second_derivative_trains_by_finite_differences():
    model = keras.Sequential(
        [keras.Input((D,)), layers.Dense(H, name="hidden"), OnceDifferentiable(), layers.Dense(K, name="out")]
    )
    model.set_weights(NETWORK)
    wrapped = regularized(model)
    assert wrapped.method == "finite_difference"
    step = sgd_step(reference_of("finite_difference", "loss"), NETWORK, WEIGHT, RATE)
    history = fit(wrapped)
    close(history["input_gradient_penalty"], PENALTIES["finite_difference", "loss", 2][:1])
    assert_stepped(NETWORK, model, step)


def test_kinks_are_answered_by_finite_differences():
    wrapped = regularized(network(activation="relu"), compiled=QUICK)
    assert wrapped.method == "finite_difference"
    a, b, c, d = (w.astype("float64") for w in NETWORK)

    def losses(x):
        return cross_entropy().values(np.maximum(x @ a + b, 0) @ c + d)[:, 0]

    x = X.astype("float64")
    active = x @ a + b > 0
    u = cross_entropy().gradients(np.maximum(x @ a + b, 0) @ c + d)[:, 0]
    g = (u @ c.T * active) @ a.T
    length = np.linalg.norm(g, axis=1, keepdims=True)
    quotients = (losses(x + 0.1 * g / length) - losses(x)) / 0.1
    close(train(wrapped)["input_gradient_penalty"], np.mean(quotients**2))


def test_smooth_models_are_differentiated_twice():
    for activation in ("tanh", "softplus", "gelu", "silu"):
        assert InputGradientRegularized(network(activation=activation), WEIGHT).method == "exact"


def test_summary_says_which_method_and_why(capsys):
    regularized().summary()
    assert "exact of 'loss', norm 2, squared, because no kinks were found" in capsys.readouterr().out
    lines = []
    wrapped = regularized(
        network(activation="relu"), target=keras_margin, norm="inf", squared=False, center=1.0, step_size=0.5
    )
    wrapped.summary(print_fn=lambda line, **_: lines.append(line))
    text = "\n".join(lines)
    assert "finite_difference (step_size=0.5) of 'keras_margin', norm inf around 1" in text
    assert "squared" not in text
    assert "because 'hidden' uses 'relu', which has kinks" in text
    lines.clear()
    wrapped = regularized(target="outputs", method="random_projection", projections=3)
    wrapped.summary(print_fn=lambda line, **_: lines.append(line))
    assert "random_projection (projections=3) of 'outputs', norm 2, squared" in "\n".join(lines)


@pytest.mark.parametrize("method", ["exact", "random_projection"])
def test_methods_that_the_compiler_cannot_take(method):
    if kernels.COMPILES_SECOND_ORDER:
        pytest.skip("the compiler of this backend takes second derivatives")
    wrapped = InputGradientRegularized(network(), WEIGHT, target="outputs", method=method)
    with pytest.raises(ValueError, match="Received: jit_compile=True. Use method='finite_difference'"):
        wrapped.compile("sgd", LOSS, jit_compile=True)


def test_auto_follows_the_compiler(backend, capsys):
    wrapped = regularized(compiled={"jit_compile": True})
    assert wrapped.method == ("finite_difference" if backend == "torch" else "exact")
    wrapped.summary()
    if backend == "torch":
        assert "because the compiler of this backend cannot differentiate twice" in capsys.readouterr().out
    wrapped.compile("sgd", LOSS, jit_compile=False)
    assert wrapped.method == "exact"


@pytest.mark.slow
def test_a_step_of_a_model_that_torch_compiled(backend):
    if backend != "torch":
        pytest.skip("the compilers of the other backends take less time: see test_a_step_when_compiled")
    step = sgd_step(reference_of("finite_difference", "loss"), NETWORK, WEIGHT, RATE)
    wrapped = regularized(compiled={"jit_compile": True})
    logs = evaluate(wrapped)
    history = fit(wrapped)
    close([logs["input_gradient_penalty"], history["input_gradient_penalty"][0]], step.penalty)
    assert_stepped(NETWORK, wrapped.model, step)
    assert wrapped.jit_compile


# --- the warning ---


def warnings_of_dominance(wrapped, **kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(wrapped, 3, **kwargs)
    return [str(w.message) for w in caught if "dominates the loss" in str(w.message)]


def test_a_penalty_that_drowns_the_loss_is_warned_of_once_a_fit():
    wrapped = regularized(weight=1e3, rate=0.0, compiled=QUICK)
    for _ in range(2):
        (message,) = warnings_of_dominance(wrapped)
        assert "Received: weight=1000.0" in message
        assert f"{1e3 * PENALTIES['exact', 'loss', 2][0]:.3g}, and the rest" in message
    assert len(warnings_of_dominance(wrapped, callbacks=[keras.callbacks.History()])) == 1
    assert not warnings_of_dominance(regularized(weight=1.0, compiled=QUICK))


# --- copies ---

OPTIONS = {
    "margin": {"target": keras_margin, "norm": "inf", "squared": False, "center": 0.5, "method": "finite_difference"},
    "outputs": {"target": "outputs", "method": "random_projection", "projections": 2, "seed": 4, "every": 2},
    "loss": {"norm": 1, "step_size": 0.25, "inputs": [0], "frozen_statistics": True},
}


@pytest.mark.parametrize(
    ("options", "weight"), list(zip(OPTIONS.values(), (Ramp(), Ramp(), 0.25), strict=True)), ids=OPTIONS
)
class TestCopies:
    def test_config(self, options, weight):
        wrapped = InputGradientRegularized(network(), weight, name="robust", **options)
        config = wrapped.get_config()
        json.dumps(keras.saving.serialize_keras_object(wrapped))
        again = InputGradientRegularized.from_config(config)
        assert again.get_config() == config and again.name == "robust"
        assert again.model is not wrapped.model

    @pytest.mark.slow
    def test_clone(self, options, weight):
        wrapped = regularized(weight=weight, compiled=QUICK, **options)
        clone = keras.models.clone_model(wrapped)
        clone.compile("sgd", LOSS, **QUICK)
        clone.set_weights(wrapped.get_weights())
        close([*evaluate(clone).values()], [*evaluate(wrapped).values()])
        assert clone.model is not wrapped.model

    def test_save_and_load(self, options, weight, tmp_path):
        wrapped = regularized(weight=weight, compiled=QUICK, **options)
        fit(wrapped)
        wrapped.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        # In a file, tuples are lists.
        assert json.loads(json.dumps(loaded.get_config())) == json.loads(json.dumps(wrapped.get_config()))
        # The weights are the same, and the steps go on.
        for model in (wrapped, loaded):
            model.run_eagerly = wrapped.run_eagerly
        if wrapped._seeds is not None:  # Keras saves no seeds, neither those of dropout
            loaded._seeds.state.assign(ops.convert_to_numpy(wrapped._seeds.state))
        expected, history = fit(wrapped, 2), fit(loaded, 2)
        for name in expected:
            close(history[name], expected[name], rtol=1e-6)
        for a, b in zip(wrapped.model.get_weights(), loaded.model.get_weights(), strict=True):
            close(b, a)


def test_export_gives_the_wrapped_model(tmp_path, backend):
    wrapped = regularized(compiled=QUICK)
    expected = wrapped.model.predict(X[:1], verbose=0)
    if backend == "torch":
        import torch

        if KERAS < (3, 15):
            pytest.skip("this Keras exports no format of torch")
        # The only format of torch that needs no other package; its batch has the size of Keras' example.
        wrapped.export(tmp_path / "model.pt2", format="torch", verbose=False)
        given = torch.export.load(str(tmp_path / "model.pt2")).module()(torch.from_numpy(X[:1])).detach().numpy()
    else:
        tf = pytest.importorskip("tensorflow")
        wrapped.export(tmp_path / "model", verbose=False)
        exported = tf.saved_model.load(str(tmp_path / "model"))
        given = exported.serve(X[:1]).numpy()
    close(given, expected)
