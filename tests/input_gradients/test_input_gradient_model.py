"""`InputGradientRegularized` as a Keras model: kinds of losses and inputs, Keras' loops, choice of a method, copies."""

import json
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_gradtools.models import InputGradientRegularized
from tests.cases import KERAS
from tests.input_gradients.regularized import (
    LINEAR,
    LOSS,
    PENALTIES,
    QUICK,
    RATE,
    RNG,
    SAMPLE_WEIGHT,
    SLOW,
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
from tests.input_gradients.tanh_network import (
    NETWORK,
    D,
    H,
    K,
    N,
    Reference,
    X,
    Y,
    cross_entropy,
    keras_margin,
    network,
    sgd_step,
)

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
    with pytest.raises(ValueError, match="that the model does not have. Received: 'pixels'. The inputs are"):
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
