"""Uses of `input_gradient_penalty`: compiled, in half precision, in a training step; what is refused, what is left."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.keras_internals import scopes
from tests.cases import tensor
from tests.input_gradients.perceptron import (
    INDICES,
    KERNEL,
    VALUES,
    WEIGHTS,
    A,
    B,
    D,
    H,
    K,
    N,
    T,
    X,
    Y,
    loss_of_examples,
    penalty_of,
    perceptron,
    score,
    several_inputs,
    value_and_gradient,
)
from tests.input_gradients.reference import Reference, numpy

# --- what a call leaves behind ---


@pytest.mark.parametrize(
    ("method", "frozen"),
    [("exact", False), ("exact", True), ("finite_difference", True), ("random_projection", False)],
)
def test_nothing_is_changed(method, frozen, backend):
    model = keras.Sequential(
        [
            keras.Input((D,)),
            layers.BatchNormalization(),
            layers.Dropout(0.5, seed=1),
            layers.Dropout(0.5),
            layers.ActivityRegularization(l2=0.1),
            layers.Dense(K, kernel_regularizer="l2"),
        ]
    )
    model.compile("sgd", "mse", metrics=["mae"])
    x = tensor(X)
    model(x, training=True)
    random = np.random.get_state()[1].copy()
    losses, before = [numpy(v) for v in model.losses], [numpy(v.value) for v in model.variables]
    seeds = numpy(scopes.global_seed_generator().state.value)
    if backend == "torch":
        import torch

        state = torch.random.get_rng_state()
    target = "outputs" if method == "random_projection" else "loss"
    penalty_of(model, x, tensor(Y), target=target, method=method, frozen_statistics=frozen, seed=3)
    if backend == "torch":
        assert torch.equal(state, torch.random.get_rng_state())
        assert not x.requires_grad and x.grad is None
    assert len(losses) == len(model.losses) == 2
    np.testing.assert_array_equal(losses, [numpy(v) for v in model.losses])
    for old, new in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(old, numpy(new.value))
    np.testing.assert_array_equal(seeds, numpy(scopes.global_seed_generator().state.value))
    np.testing.assert_array_equal(random, np.random.get_state()[1])
    assert [layer.trainable for layer in model.layers] == [True] * 5
    np.testing.assert_array_equal(numpy(x), X.astype("float32"))


def test_the_caller_s_requires_grad(backend):
    if backend != "torch":
        pytest.skip("only torch's tensors have a requires_grad")
    x = tensor(X).requires_grad_(True)
    value = penalty_of(perceptron(), x, tensor(Y), loss="mse", method="exact")
    value.backward()
    assert x.requires_grad and x.grad.shape == x.shape


def test_a_failed_call_leaves_nothing_behind():
    model = perceptron()
    before = model.get_weights()
    with pytest.raises(ValueError, match="must return one number for each example"):
        penalty_of(model, X.astype("float32"), target=lambda y, y_pred: ops.mean(y_pred))
    for was, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(was, now)
    model.compile("sgd", "mse")
    assert np.isfinite(model.train_on_batch(X.astype("float32"), Y))


# --- how it is called ---


def close_to(found, expected, rtol=1e-5):
    value, gradients = expected
    np.testing.assert_allclose(numpy(found[0]), value, rtol=rtol)
    for g, e in zip(found[1], gradients, strict=True):
        np.testing.assert_allclose(numpy(g), e, rtol=rtol, atol=rtol)


CALLS = {
    "exact": {"method": "exact"},
    "finite_difference": {"method": "finite_difference"},
    "random_projection": {"method": "random_projection", "target": "outputs", "seed": 3},
    "auto": {"method": "auto", "norm": 1},
}


@pytest.mark.parametrize("name", CALLS)
def test_compiled(name):
    model, options = perceptron(), {"loss": "mse", **CALLS[name]}
    expected = value_and_gradient(model, X.astype("float32"), Y.astype("float32"), **options)

    def step(x, y):
        with kg.GradientTape() as tape:
            value = penalty_of(model, x, y, **options)
        return value, tape.gradient(value, model.trainable_variables, unconnected_gradients="zero")

    compiled = kg.jit(step)
    for _ in range(2):
        close_to(compiled(tensor(X), tensor(Y)), expected)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_auto_settles_on_the_same_method_when_compiled(activation):
    model = perceptron(activation=activation)
    method = {"relu": "finite_difference", "tanh": "exact"}[activation]

    def penalty(method):
        return lambda x, y: penalty_of(model, x, y, loss="mse", method=method, step_size=0.5)

    expected = numpy(penalty(method)(tensor(X), tensor(Y)))
    np.testing.assert_allclose(numpy(penalty("auto")(tensor(X), tensor(Y))), expected, rtol=1e-6)
    np.testing.assert_allclose(numpy(kg.jit(penalty("auto"))(tensor(X), tensor(Y))), expected, rtol=1e-5)
    other = numpy(penalty({"relu": "exact", "tanh": "finite_difference"}[activation])(tensor(X), tensor(Y)))
    assert abs(other - expected) > 1e-2 * expected


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_with_what_the_framework_has(method, backend):
    model, options = perceptron(), {"loss": "mse", "method": method}
    x, y = tensor(X), tensor(Y)
    expected = value_and_gradient(model, x, y, **options)
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = penalty_of(model, x, y, **options)
        gradients = tape.gradient(value, [v.value for v in model.trainable_variables], unconnected_gradients="zero")
    elif backend == "torch":
        value = penalty_of(model, x, y, **options)
        value.backward()
        gradients = [ops.zeros(v.shape) if v.value.grad is None else v.value.grad for v in model.trainable_variables]
    else:
        import jax

        def penalty(values):
            with keras.StatelessScope(list(zip(model.trainable_variables, values, strict=True))):
                return penalty_of(model, x, y, **options)

        value, gradients = jax.jit(jax.value_and_grad(penalty))([v.value for v in model.trainable_variables])
    close_to((value, gradients), expected)


@pytest.mark.parametrize("method", ["exact", "finite_difference", "random_projection"])
def test_inside_a_training_step_of_one_s_own(method, backend):
    target = "outputs" if method == "random_projection" else "loss"

    class Regularized(keras.Model):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def call(self, x, training=None):
            return self.model(x, training=training)

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            loss = super().compute_loss(x, y, y_pred, sample_weight, training)
            options = {"loss": "mse", "target": target, "method": method, "seed": 3}
            return loss + 0.1 * penalty_of(self.model, x, y, **options)

    model = Regularized(perceptron())
    x, y = X.astype("float32"), Y.astype("float32")
    _, penalties = value_and_gradient(model.model, x, y, loss="mse", target=target, method=method, seed=3)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.train_on_batch(x, y)
    plain = perceptron()
    plain.compile(keras.optimizers.SGD(0.1), "mse")
    plain.train_on_batch(x, y)
    for now, without, g in zip(model.get_weights(), plain.get_weights(), penalties, strict=True):
        np.testing.assert_allclose(now, without - 0.01 * g, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_half_precision(method):
    model = keras.Sequential(
        [
            keras.Input((D,)),
            layers.Dense(H, activation="tanh", dtype="mixed_float16"),
            layers.Dense(K, dtype="mixed_float16"),
        ]
    )
    model.set_weights(WEIGHTS)
    step_size = 0.2 if method == "finite_difference" else None
    reference = Reference(VALUES["loss"], WEIGHTS, [X], step_size=step_size)
    options = {"loss": loss_of_examples(), "method": method, "step_size": 0.2}
    with kg.GradientTape() as tape:
        value = penalty_of(model, X.astype("float32"), Y.astype("float32"), **options)
    gradients = tape.gradient(value, model.trainable_variables)
    assert keras.backend.standardize_dtype(value.dtype) == "float32"
    assert {keras.backend.standardize_dtype(g.dtype) for g in gradients} == {"float32"}
    expected = reference.gradient()
    scale = max(abs(e).max() for e in expected)
    np.testing.assert_allclose(numpy(value), reference(WEIGHTS), rtol=3e-2)
    for g, e in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(numpy(g), e, rtol=3e-2, atol=3e-2 * scale)


def test_half_precision_keeps_small_gradients():
    # By a mean over the batch in half precision, these gradients of about 1e-6 would be rounded to zero.
    model = keras.Sequential([keras.Input((D,)), layers.Dense(K, use_bias=False, dtype="float16")])
    model.set_weights([np.sign(KERNEL)])
    x = np.ones((512, D), "float16")

    def loss(y, y_pred):
        return 1e-6 * ops.sum(ops.cast(y_pred, "float32"), axis=-1)

    found = penalty_of(model, x, np.zeros((512, K), "float16"), loss=loss, method="exact")
    assert keras.backend.standardize_dtype(found.dtype) == "float32"
    np.testing.assert_allclose(numpy(found), 1e-12 * (np.sign(KERNEL).sum(axis=1) ** 2).sum(), rtol=0.1)


def test_any_function_is_a_model():
    found = penalty_of(lambda x: ops.sin(x), X.astype("float32"), target="outputs", method="exact")
    np.testing.assert_allclose(numpy(found), np.mean((np.cos(X) ** 2).sum(axis=1)), rtol=1e-5)


def test_a_layer_and_outputs_of_one_number():
    layer = layers.Dense(1)
    layer.build((None, D))
    layer.set_weights([KERNEL[:, :1], np.zeros(1)])
    expected = (KERNEL[:, 0] ** 2).sum()
    for method in ("exact", "finite_difference", "random_projection"):
        found = penalty_of(layer, X.astype("float32"), target="outputs", method=method)
        np.testing.assert_allclose(numpy(found), expected, rtol=1e-4)
        flat = penalty_of(lambda x: layer(x)[:, 0], X.astype("float32"), target="outputs", method=method)
        np.testing.assert_allclose(numpy(flat), expected, rtol=1e-4)


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_a_function_may_return_a_column_and_use_labels(method):
    x, y = X.astype("float32"), Y.astype("float32")
    row = penalty_of(perceptron(), x, y, target=score, method=method)
    column = penalty_of(perceptron(), x, y, target=lambda y, y_pred: score(y, y_pred)[:, None], method=method)
    np.testing.assert_allclose(numpy(row), numpy(column), rtol=1e-6)


def test_integer_labels_and_the_name_of_a_loss():
    model = keras.Sequential([perceptron(), layers.Softmax()])
    labels = Y.argmax(axis=1)
    found = penalty_of(model, X.astype("float32"), labels, loss="sparse_categorical_crossentropy", method="exact")
    one_hot = penalty_of(
        model, X.astype("float32"), Y.astype("float32"), loss="categorical_crossentropy", method="exact"
    )
    np.testing.assert_allclose(numpy(found), numpy(one_hot), rtol=1e-5)


def test_the_loss_given_goes_before_the_one_compiled():
    model = perceptron()
    model.compile("sgd", "mae")
    x, y = X.astype("float32"), Y.astype("float32")
    given, compiled = penalty_of(model, x, y, loss="mse", method="exact"), penalty_of(model, x, y, method="exact")
    np.testing.assert_allclose(numpy(given), numpy(penalty_of(perceptron(), x, y, loss="mse", method="exact")))
    assert abs(numpy(given) - numpy(compiled)) > 1e-3


def test_an_unbuilt_model_is_refused_and_left_unbuilt():
    model = keras.Sequential([layers.Dense(K), layers.Dropout(0.5)], name="raw")
    with pytest.raises(ValueError, match="expects a built model. Received: the unbuilt model 'raw'"):
        penalty_of(model, X.astype("float32"), target="outputs", method="exact")
    assert not model.built
    assert model(X.astype("float32")).shape == (N, K)


def test_the_first_random_number_of_a_process_may_be_ours():
    # What Keras makes at the first draw without a seed must outlive the call.
    name = "global_seed_generator"
    scopes.global_state.set_global_attribute(name, None)
    penalty_of(perceptron(), X.astype("float32"), target="outputs", method="random_projection")
    one, two = numpy(keras.random.normal((2,))), numpy(keras.random.normal((2,)))
    assert np.isfinite(one).all() and (one != two).all()


# --- bad options ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target": "logits"},
            "expects 'loss', 'outputs' or a function as `target`. Received: target='logits'",
        ),
        ({"target": None}, "expects 'loss', 'outputs' or a function as `target`. Received: target=None"),
        ({"norm": 3}, "expects 1, 2 or 'inf' as `norm`. Received: norm=3"),
        ({"norm": True}, "expects 1, 2 or 'inf' as `norm`. Received: norm=True"),
        ({"norm": "2"}, "expects 1, 2 or 'inf' as `norm`. Received: norm='2'"),
        ({"squared": 1}, "expects True or False as `squared`. Received: squared=1"),
        (
            {"frozen_statistics": None},
            "expects True or False as `frozen_statistics`. Received: frozen_statistics=None",
        ),
        ({"center": "1"}, "expects a finite number as `center`. Received: center='1'"),
        ({"center": float("nan")}, "expects a finite number as `center`. Received: center=nan"),
        ({"step_size": 0.0}, "expects a positive number as `step_size`. Received: step_size=0.0"),
        ({"step_size": -1}, "expects a positive number as `step_size`. Received: step_size=-1"),
        (
            {"step_size": float("inf")},
            "expects a positive number as `step_size`. Received: step_size=inf",
        ),
        ({"method": "double"}, "as `method`. Received: method='double'"),
        ({"method": None}, "expects 'auto', 'exact', 'finite_difference' or 'random_projection' as `method`."),
        (
            {"method": "random_projection", "target": score},
            "This target has one number for each example",
        ),
        ({"method": "random_projection"}, "if `target` is not 'outputs' as `method`. Received: method="),
        ({"projections": 0}, "expects a positive integer, or -1 for all outputs, as `projections`. Received: "),
        ({"projections": -2}, "Received: projections=-2"),
        ({"projections": 1.0}, "Received: projections=1.0"),
        ({"projections": True}, "Received: projections=True"),
        ({"inputs": []}, "expects the name of an input, its position, or a list of these as `inputs`. Received: "),
        ({"inputs": 1.5}, "as `inputs`. Received: inputs=1.5"),
        ({"inputs": True}, "as `inputs`. Received: inputs=True"),
        ({"inputs": "image"}, "that the model does not have. Received: 'image'. The inputs are "),
        ({"inputs": 1}, "that the model does not have. Received: 1. The inputs are "),
        ({"loss": None}, "needs a loss. Received: loss=None and a model that was not compiled with one."),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError) as error:
        penalty_of(perceptron(), X.astype("float32"), Y.astype("float32"), **{"loss": "mse", **options})
    assert "input_gradient_penalty" in str(error.value) and message in str(error.value)


@pytest.mark.parametrize("options", [{"norm": 1}, {"squared": False}, {"center": 1.0}], ids=str)
@pytest.mark.parametrize("method", ["random_projection", "finite_difference"])
def test_projections_are_refused_where_they_are_biased(method, options):
    with pytest.raises(ValueError, match="estimate only the squared l2 norm without bias") as error:
        penalty_of(perceptron(), X.astype("float32"), target="outputs", method=method, **options)
    assert "Received: projections=1" in str(error.value)


@pytest.mark.parametrize(
    "returned", [lambda y: ops.mean(y), lambda y: y, lambda y: 1.0], ids=["scalar", "matrix", "float"]
)
@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_a_function_of_another_shape(method, returned):
    with pytest.raises(ValueError, match="must return one number for each example, of shape"):
        penalty_of(perceptron(), X.astype("float32"), target=lambda y, y_pred: returned(y_pred), method=method)


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_inputs_without_a_gradient(method):
    model = keras.Sequential([keras.Input((T,), dtype="int32"), layers.Embedding(3, 2), layers.Flatten()])
    with pytest.raises(
        ValueError, match="differentiates with respect to floating-point inputs. Received: inputs without"
    ):
        penalty_of(model, np.ones((N, T), "int32"), target="outputs", method=method)
    model, _ = several_inputs()
    x = {"a": A.astype("float32"), "b": B.astype("float32"), "i": INDICES}
    with pytest.raises(ValueError, match=r"Received: inputs=\['i'\], of which some have no gradient"):
        penalty_of(model, x, target="outputs", method=method, inputs="i")
    with pytest.raises(ValueError, match="inputs that the target does not depend on differentiably"):
        penalty_of(perceptron(), X.astype("float32"), method=method, target=lambda y, y_pred: ops.zeros((N,)))


def test_what_is_not_a_model():
    with pytest.raises(ValueError, match="expects a Keras model or a function as `model`. Received: 'model'"):
        penalty_of("model", X, target="outputs")
