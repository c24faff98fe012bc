"""`InputGradientPenalty`: its value and its gradient, alone and in models, against NumPy."""

import json

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.layers import InputGradientPenalty
from keras_gradtools.models import InputGradientRegularized
from tests.cases import central_differences
from tests.input_gradients.tanh_network import (
    NETWORK,
    D,
    H,
    K,
    N,
    Reference,
    Target,
    X,
    Y,
    all_outputs,
    cross_entropy,
    direction_of,
    drawn_mixtures,
    network,
    sgd_step,
)

RNG = np.random.default_rng(5)
WEIGHT, RATE = 0.3, 0.02
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
KERNEL = RNG.normal(size=(D, K)).astype("float32")
# What takes the least time for a step or two: on JAX, eager operations are compiled one by one.
QUICK = {} if keras.config.backend() == "jax" else {"run_eagerly": True}


@keras.saving.register_keras_serializable(package="tests_input_gradient_penalty")
def sum_of_squares(y):
    return ops.sum(ops.square(y), axis=-1)


@keras.saving.register_keras_serializable(package="tests_input_gradient_penalty")
def mean_output(y, y_pred):
    return ops.mean(y_pred, axis=-1)


@keras.saving.register_keras_serializable(package="tests_input_gradient_penalty")
class Ramp(keras.optimizers.schedules.LearningRateSchedule):
    """Steps of 0.1, from 0.1 on."""

    def __call__(self, step):
        return 0.1 * (ops.cast(step, "float32") + 1.0)

    def get_config(self):
        return {}


SQUARES = Target(lambda z: (z**2).sum(axis=1, keepdims=True), lambda z: 2 * z[:, None])


def close(actual, desired, rtol=1e-5, atol=1e-6):
    actual = ops.convert_to_numpy(actual) if ops.is_tensor(actual) else np.asarray(actual)
    np.testing.assert_allclose(actual.astype("float64"), desired, rtol=rtol, atol=atol)


def loss_of_step(model, x):
    # Keras 3.10 logs the mean over all steps since the last reset.
    model.reset_metrics()
    return model.train_on_batch(x, Y, return_dict=True)["loss"]


def linear(weight=WEIGHT, name="smooth", **options):
    """A penalty on a linear layer, whose Jacobian is its kernel."""
    layer = InputGradientPenalty(layers.Dense(K, use_bias=False), weight, name=name, **options)
    layer.build((None, D))
    layer.layer.set_weights([KERNEL])
    return layer


def compiled(model, loss=LOSS, rate=RATE, **kwargs):
    model.compile(keras.optimizers.SGD(rate), loss, **{**QUICK, **kwargs})
    return model


def fit(model, x=X, y=Y, epochs=1, **kwargs):
    """What is logged for each epoch, of one step by default."""
    return model.fit(x, y, **{"batch_size": N, "shuffle": False, "verbose": 0, **kwargs}, epochs=epochs).history


def evaluate(model, x=X, y=Y):
    return model.evaluate(x, y, batch_size=N, verbose=0, return_dict=True)


def assert_stepped(before, after, expected, rate=RATE, rtol=2e-4, atol=2e-4):
    for was, now, wanted in zip(before, after, expected, strict=True):
        close((was.astype("float64") - now) / rate, (was - wanted) / rate, rtol, atol)


# --- alone ---


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (KERNEL**2).sum()),
        ({"method": "finite_difference", "projections": -1}, (KERNEL**2).sum()),
        ({"norm": 1}, np.abs(KERNEL).sum() ** 2),
        ({"norm": "inf", "squared": False}, np.abs(KERNEL).max()),
        ({"squared": False, "center": 1.0}, abs(np.linalg.norm(KERNEL) - 1)),
    ],
    ids=str,
)
def test_value_and_gradient(options, expected):
    layer = linear(**options)
    with kg.GradientTape() as tape:
        y = layer(X, training=True)
        (loss,) = layer.losses
    close(y, X @ KERNEL)
    close(loss, WEIGHT * expected)
    if not options:
        close(tape.gradient(loss, layer.layer.kernel), 2 * WEIGHT * KERNEL)
    close(layer(X, training=False), X @ KERNEL)
    assert layer.losses == []


def test_symbolic_outputs_are_those_of_the_layer():
    layer = InputGradientPenalty(layers.Dense(7, dtype="mixed_float16"), WEIGHT)
    y = layer(keras.KerasTensor((None, 5, D)))
    assert y.shape == (None, 5, 7) and y.dtype == "float16"
    assert [w.shape for w in layer.trainable_weights] == [(D, 7), (7,)]


# --- in models ---


def sequential(layer):
    return keras.Sequential([keras.Input((D,)), layer])


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({"method": "exact"}, Reference(all_outputs())),
        (
            {"method": "exact", "norm": 1, "squared": False, "center": 1.0},
            Reference(all_outputs(), "exact", 1, False, 1.0),
        ),
        ({"method": "finite_difference", "projections": -1}, Reference(all_outputs(), "finite_difference")),
        (
            {"method": "finite_difference", "norm": "inf", "target": sum_of_squares},
            Reference(SQUARES, "finite_difference", "inf"),
        ),
        ({"method": "random_projection", "projections": -1}, Reference(all_outputs())),
    ],
    ids=["exact", "exact-1", "finite_difference", "finite_difference-function", "random_projection"],
)
def test_a_step_of_fit(options, reference):
    inner = network()
    model = compiled(sequential(InputGradientPenalty(inner, WEIGHT, name="smooth", **options)))
    step = sgd_step(reference, NETWORK, WEIGHT, RATE)
    history = fit(model)
    close(history["loss"], [step.loss])
    assert_stepped(NETWORK, inner.get_weights(), step.after)


@pytest.mark.parametrize("options", [{}, {"jit_compile": True}], ids=str)
def test_a_step_when_compiled(options, backend):
    if backend == "torch":
        pytest.skip("torch.compile cannot differentiate twice, and Keras compiles the whole step with it")
    inner = network()
    model = sequential(InputGradientPenalty(inner, WEIGHT, name="smooth"))
    model.compile(keras.optimizers.SGD(RATE), LOSS, **options)
    step = sgd_step(Reference(all_outputs()), NETWORK, WEIGHT, RATE)
    history = fit(model)
    close(history["loss"], [step.loss])
    assert_stepped(NETWORK, inner.get_weights(), step.after)


@pytest.mark.parametrize("method", ["random_projection", "finite_difference"])
def test_projections_that_are_drawn(method):
    inner = network()
    model = compiled(sequential(InputGradientPenalty(inner, WEIGHT, method=method, projections=2, seed=5)))
    seeds = keras.random.SeedGenerator(5)
    before = NETWORK
    for _ in range(2):
        step = sgd_step(Reference(drawn_mixtures(seeds, 2), method), before, WEIGHT, RATE)
        close(loss_of_step(model, X), step.loss)
        assert_stepped(before, inner.get_weights(), step.after)
        before = inner.get_weights()


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_gradient_reaches_what_its_input_depends_on(method):
    # An encoder tanh(x A), and a penalized head tanh(h B), whose Jacobian depends on h.
    a, b = (RNG.normal(size=shape, scale=0.7).astype("float32") for shape in ((D, H), (H, K)))
    head = layers.Dense(K, use_bias=False, activation="tanh", name="head")
    penalized = InputGradientPenalty(head, WEIGHT, method=method, norm=2, target=sum_of_squares, name="smooth")
    inputs = keras.Input((D,))
    encoder = layers.Dense(H, use_bias=False, activation="tanh", name="encoder")
    model = compiled(keras.Model(inputs, penalized(encoder(inputs))), "mse")
    encoder.set_weights([a])
    head.set_weights([b])
    targets, step = RNG.normal(size=(N, K)), 0.1

    def gradient(h, b):
        z = np.tanh(h @ b)
        return (2 * z * (1 - z**2)) @ b.T

    g = gradient(np.tanh(X.astype("float64") @ a), b)
    shift = step * direction_of(g, 2)

    def penalty(weights):
        h = np.tanh(X @ weights[0])
        if method == "exact":
            return np.mean((gradient(h, weights[1]) ** 2).sum(axis=1))
        difference = np.tanh((h + shift) @ weights[1]) ** 2 - np.tanh(h @ weights[1]) ** 2
        return np.mean((difference.sum(axis=1) / step) ** 2)

    def total(weights):
        h = np.tanh(X @ weights[0])
        return np.mean((np.tanh(h @ weights[1]) - targets) ** 2) + WEIGHT * penalty(weights)

    weights = [w.astype("float64") for w in (a, b)]
    expected = [w - RATE * g for w, g in zip(weights, central_differences(total, weights), strict=True)]
    alone = central_differences(penalty, weights)[0]
    assert np.abs(alone).max() > 0.1  # the penalty has a gradient by the encoder that a test can see
    history = fit(model, X, targets.astype("float32"))
    close(history["loss"], [total(weights)])
    assert_stepped([a, b], [*encoder.get_weights(), *head.get_weights()], expected)


def test_evaluation_adds_nothing():
    model = compiled(sequential(InputGradientPenalty(network(), WEIGHT, name="smooth")))
    z = cross_entropy().values(ops.convert_to_numpy(network()(X)).astype("float64"))
    close(evaluate(model)["loss"], z.mean())
    close(model.predict(X, verbose=0), network().predict(X, verbose=0))


def test_weight_zero_adds_nothing():
    model = compiled(sequential(linear(0)), "mse")
    history = fit(model, y=np.zeros((N, K), "float32"))
    z = X.astype("float64") @ KERNEL
    close(history["loss"], [np.mean(z**2)])
    assert_stepped([KERNEL], model.get_weights(), [KERNEL - RATE * 2 / (N * K) * X.T.astype("float64") @ z])


def test_several_inputs_are_penalized_together():
    class Both(layers.Layer):
        def __init__(self):
            super().__init__()
            self.p, self.q = layers.Dense(1, use_bias=False), layers.Dense(1, use_bias=False)

        def build(self, shapes):
            self.p.build(shapes["a"])
            self.q.build(shapes["b"])

        def call(self, inputs):
            return self.p(inputs["a"]) + self.q(inputs["b"]) * ops.cast(inputs["i"], "float32")

    layer = InputGradientPenalty(Both(), WEIGHT)
    data = {"a": X, "b": X[:, :2], "i": np.full((N, 1), 2, "int32")}
    data = {name: ops.convert_to_tensor(value) for name, value in data.items()}
    layer.build({name: value.shape for name, value in data.items()})
    layer.layer.p.set_weights([KERNEL[:, :1]])
    layer.layer.q.set_weights([np.array([[3.0], [4.0]])])
    layer(data, training=True)
    close(layer.losses[0], WEIGHT * ((KERNEL[:, 0] ** 2).sum() + 4 * 25))


# --- masks ---


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_masks_pass_in_and_out(inside, method):
    t = 3
    x = RNG.normal(size=(N, t, D)).astype("float32")
    valid = np.arange(t) < (np.arange(N) % t + 1)[:, None]
    x[~valid] = 0.0
    dense = layers.Dense(K, use_bias=False)
    part = keras.Sequential([keras.Input((t, D)), layers.Masking(), dense]) if inside else dense
    penalized = InputGradientPenalty(part, WEIGHT, method=method, projections=-1)
    before = [] if inside else [layers.Masking()]
    model = keras.Sequential([keras.Input((t, D)), *before, penalized, layers.GlobalAveragePooling1D()])
    dense.set_weights([KERNEL])
    pooled = (x * valid[..., None]).sum(axis=1) / valid.sum(axis=1, keepdims=True) @ KERNEL
    close(model.predict(x, verbose=0), pooled)
    penalty = np.mean(valid.sum(axis=1)) * (KERNEL**2).sum()
    logs = compiled(model, "mse").train_on_batch(x, np.zeros((N, K), "float32"), return_dict=True)
    close(logs["loss"], np.mean(pooled**2) + WEIGHT * penalty)


# --- layers with state ---


@pytest.mark.parametrize(
    ("method", "frozen"), [("exact", False), ("exact", True), ("finite_difference", False), ("finite_difference", True)]
)
def test_a_step_changes_statistics_once(method, frozen):
    normalization, dense = layers.BatchNormalization(momentum=0.9), layers.Dense(1, use_bias=False)
    inner = keras.Sequential([keras.Input((D,)), normalization, dense])
    variance = RNG.uniform(0.5, 1.5, D).astype("float32")
    normalization.set_weights([np.ones(D), np.zeros(D), np.zeros(D), variance])
    dense.set_weights([KERNEL[:, :1]])
    layer = InputGradientPenalty(
        inner, WEIGHT, target=sum_of_squares, method=method, step_size=1e-2, frozen_statistics=frozen
    )
    model = compiled(sequential(layer), "mse")
    x, w = X.astype("float64"), KERNEL[:, 0].astype("float64")

    def values(x, frozen=frozen):
        mean, of_batch = (0.0, variance) if frozen else (x.mean(axis=0), x.var(axis=0))
        return ((x - mean) / np.sqrt(of_batch + 1e-3) @ w) ** 2

    g = central_differences(lambda v: values(v[0]).sum(), [x])[0]
    slope = np.linalg.norm(g, axis=1)
    if method == "finite_difference":
        slope = (values(x + 1e-2 * g / slope[:, None]) - values(x)) / 1e-2
    logs = model.train_on_batch(X, np.zeros((N, 1), "float32"), return_dict=True)
    close(logs["loss"], values(x, False).mean() + WEIGHT * np.mean(slope**2), rtol=1e-4)
    close(normalization.moving_mean, 0.1 * X.mean(axis=0))
    close(normalization.moving_variance, 0.9 * variance + 0.1 * X.var(axis=0))


def test_dropout_draws_the_same_mask_again():
    inner = keras.Sequential([keras.Input((D,)), layers.Dropout(0.5), layers.Dense(1, use_bias=False)])
    inner.layers[-1].set_weights([np.ones((D, 1))])
    model = compiled(
        sequential(InputGradientPenalty(inner, 1.0, method="finite_difference")),
        lambda y, y_pred: 0.0 * y_pred[:, 0],
        0.0,
    )
    # At x = 1, the output 2 mask . x is twice the number of ones, and the squared norm of its gradient 4 times that.
    losses = [float(loss_of_step(model, np.ones((N, D), "float32"))) * N / 4 for _ in range(3)]
    close(losses, np.round(losses), atol=1e-3)
    assert min(losses) > 0 and max(losses) < N * D


# --- how much it counts, and when ---


@pytest.mark.parametrize(("weight", "every"), [(Ramp(), 1), (0.2, 3), (Ramp(), 2)])
def test_schedules_and_lazy_steps_resume_after_loading(weight, every, tmp_path):
    # The loss is the mean output: each step changes the kernel by that of x, and shrinks it where a penalty is due.
    model = compiled(sequential(linear(weight, every=every)), mean_output)
    w, losses = KERNEL.astype("float64"), []
    for number in range(7):
        at = 0.1 * (number + 1) if isinstance(weight, Ramp) else weight
        factor = 0.0 if number % every else at * every
        losses.append(np.mean(X @ w) + factor * (w**2).sum())
        w = w - RATE * (X.mean(axis=0)[:, None] / K + 2 * factor * w)
    found = fit(model, epochs=4)["loss"]
    evaluate(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert int(loaded.layers[-1]._steps) == 4
    close(found + fit(loaded, epochs=3)["loss"], losses)
    close(loaded.layers[-1].layer.kernel, w)


def test_lazy_steps_of_batches():
    model = compiled(sequential(linear(0.2, every=2)), mean_output)
    history = fit(model, batch_size=3)
    w, losses = KERNEL.astype("float64"), []
    for number, batch in enumerate((X[:3], X[3:6], X[6:])):
        factor = 0.0 if number % 2 else 0.4
        losses.append(len(batch) * (np.mean(batch @ w) + factor * (w**2).sum()))
        w = w - RATE * (batch.mean(axis=0)[:, None] / K + 2 * factor * w)
    close(model.layers[-1].layer.kernel, w)
    close(history["loss"], [sum(losses) / N])


# --- inside InputGradientRegularized ---


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
@pytest.mark.parametrize("frozen", [False, True])
def test_inside_a_regularized_model_it_is_counted_once(method, frozen):
    layer = linear(0.2, every=2)
    wrapped = InputGradientRegularized(sequential(layer), WEIGHT, method=method, frozen_statistics=frozen)
    wrapped.compile(keras.optimizers.SGD(RATE), mean_output, **QUICK)
    direction = KERNEL.astype("float64").mean(axis=1)
    w = KERNEL.astype("float64")
    outer = (direction**2).sum()
    logs = wrapped.train_on_batch(X, Y, return_dict=True)
    close(logs["input_gradient_penalty"], outer)
    close(logs["loss"], np.mean(X @ w) + WEIGHT * outer + 0.4 * (w**2).sum())
    assert int(layer._steps) == 1
    change = X.mean(axis=0)[:, None] / K + 2 * WEIGHT * direction[:, None] / K + 0.8 * w
    assert_stepped([KERNEL], layer.layer.get_weights(), [w - RATE * change])


def test_two_of_them_in_one_model():
    first, second = linear(0.2, "first"), InputGradientPenalty(layers.Dense(2, use_bias=False), 0.5, name="second")
    model = compiled(keras.Sequential([keras.Input((D,)), first, second]), mean_output)
    second.layer.set_weights([np.ones((K, 2))])
    logs = model.train_on_batch(X, Y, return_dict=True)
    close(logs["loss"], np.mean((X @ KERNEL).sum(axis=1)) + 0.2 * (KERNEL**2).sum() + 0.5 * 2 * K)


# --- half precision ---


def test_mixed_precision():
    layer = linear(dtype="mixed_float16")
    y = layer(X, training=True)
    assert layer.losses[0].dtype == ops.ones(()).dtype
    close(layer.losses[0], WEIGHT * (KERNEL**2).sum(), rtol=1e-2)
    close(ops.cast(y, "float32"), X @ KERNEL, rtol=1e-2, atol=1e-2)


# --- copies ---


@pytest.mark.parametrize(
    ("weight", "options"),
    [
        (
            0.25,
            {"target": sum_of_squares, "norm": "inf", "squared": False, "center": 0.5, "method": "finite_difference"},
        ),
        (Ramp(), {"method": "random_projection", "projections": 2, "seed": 4, "every": 2}),
        (Ramp(), {"norm": 1, "step_size": 0.25, "frozen_statistics": True}),
    ],
    ids=["function", "outputs", "norm"],
)
def test_copies(weight, options, tmp_path):
    layer = linear(weight, **options)
    config = layer.get_config()
    again = InputGradientPenalty.from_config(config)
    assert again.get_config() == config and again.name == "smooth"
    model = compiled(sequential(layer), "mse")
    y = np.zeros((N, K), "float32")
    fit(model, y=y)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded.run_eagerly = model.run_eagerly
    assert json.loads(json.dumps(loaded.layers[-1].get_config())) == json.loads(json.dumps(layer.get_config()))
    if layer._seeds is not None:  # Keras saves no seeds, neither those of dropout
        loaded.layers[-1]._seeds.state.assign(ops.convert_to_numpy(layer._seeds.state))
    close(fit(loaded, y=y, epochs=2)["loss"], fit(model, y=y, epochs=2)["loss"], rtol=1e-6)
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        close(b, a)
    clone = keras.models.clone_model(model)
    assert clone.layers[-1].layer is not layer.layer
    clone.set_weights(model.get_weights())
    close(clone.predict(X, verbose=0), model.predict(X, verbose=0))


# --- bad input ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: linear(target="loss"), "Received: target='loss', but a layer does not know"),
        (lambda: linear(target="output"), "expects 'loss', 'outputs' or a function as `target`"),
        (lambda: linear(-1.0), "Received: weight=-1.0"),
        (lambda: linear(norm=3), "Received: norm=3"),
        (lambda: linear(every=0), "Received: every=0"),
        (lambda: linear(method="random_projection", norm=1), "Random projections estimate only the squared l2 norm"),
        (lambda: linear(target=sum_of_squares, method="random_projection"), "This target has one number"),
        (lambda: linear(target=lambda y: y)(X, training=True), "must return one number for each example"),
        (
            lambda: InputGradientPenalty(layers.Embedding(3, 2), 0.1)(np.ones((N, 2), "int32"), training=True),
            "differentiates with respect to floating-point inputs",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)
    assert "InputGradientPenalty" in str(error.value)
