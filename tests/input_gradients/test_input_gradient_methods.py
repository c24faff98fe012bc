"""Every method, target and norm of `InputGradientRegularized` in Keras' own loops, against NumPy.

`tests/input_gradients/tanh_network.py` holds the reference: a tanh network whose input gradients are written out.
"""

import keras
import numpy as np
import pytest
from keras import layers, ops

from tests.cases import central_differences
from tests.input_gradients import tanh_network
from tests.input_gradients.regularized import (
    EAGER,
    LINEAR,
    PENALTIES,
    QUICK,
    RATE,
    RNG,
    SLOW,
    TARGETS,
    WEIGHT,
    Ramp,
    assert_stepped,
    close,
    descent,
    evaluate,
    first_output,
    fit,
    linear,
    reference_of,
    regularized,
    train,
)
from tests.input_gradients.tanh_network import NETWORK, D, K, N, Reference, X, Y, drawn_mixtures, sgd_step

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
    """What `compile` can be told on this backend besides `run_eagerly`. JAX always compiles."""
    return [{"jit_compile": True}] if keras.config.backend() == "jax" else [{}, {"jit_compile": True}]


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
    j = tanh_network.jacobian([w.astype("float64") for w in NETWORK], X[:1])[0]
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
    # The loss itself uses the statistics of the batch in both cases.
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
