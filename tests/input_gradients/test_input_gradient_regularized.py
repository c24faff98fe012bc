"""`InputGradientRegularized` against closed forms and central differences, inside Keras' own loops."""

import copy

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_gradtools.models import InputGradientRegularized
from tests.cases import central_differences

RNG = np.random.default_rng(0)
N, D, K, T = 8, 5, 3, 4
X = RNG.normal(size=(N, D)).astype("float32")
Y = RNG.integers(0, K, N)
W = RNG.normal(size=(D, K)).astype("float32")
SAMPLE_WEIGHT = RNG.uniform(0.2, 2.0, N).astype("float32")
WEIGHT = 0.3


def linear(activation=None, shape=(D,), **kwargs):
    model = keras.Sequential(
        [keras.Input(shape), layers.Dense(K, use_bias=False, activation=activation, name="out", **kwargs)]
    )
    model.set_weights([W])
    return model


def regularized(model, loss, weight=WEIGHT, optimizer="sgd", **kwargs):
    wrapped = InputGradientRegularized(model, weight)
    wrapped.compile(optimizer, loss, **kwargs)
    return wrapped


def softmax_regression(**kwargs):
    return regularized(linear("softmax"), "sparse_categorical_crossentropy", **kwargs)


def evaluate(model, *args, **kwargs):
    return model.evaluate(*args, **{"batch_size": N, "verbose": 0, "return_dict": True, **kwargs})


def softmax_closed_form(x=X, y=Y, w=1.0):
    """The penalty and the loss of softmax regression: g_i = W (p_i - y_i)."""
    p = np.exp(x @ W.astype("float64"))
    p /= p.sum(axis=1, keepdims=True)
    g = (p - np.eye(K)[y]) @ W.T
    return np.mean(w * (g**2).sum(axis=1)), np.mean(-w * np.log(p[np.arange(len(y)), y]))


def assert_logs(logs, penalty, loss, rtol=1e-5):
    np.testing.assert_allclose(logs["input_gradient_penalty"], penalty, rtol=rtol)
    np.testing.assert_allclose(logs["loss"], loss + WEIGHT * penalty, rtol=rtol)


# --- the value ---


@pytest.mark.parametrize("shape", [None, (N,), (N, 1)])
def test_penalty_of_softmax_regression(shape):
    w = None if shape is None else SAMPLE_WEIGHT.reshape(shape)
    logs = evaluate(softmax_regression(), X, Y, sample_weight=w)
    assert_logs(logs, *softmax_closed_form(w=1.0 if w is None else SAMPLE_WEIGHT))


def test_penalty_is_the_mean_over_examples_for_any_batch_size():
    assert_logs(evaluate(softmax_regression(), X, Y, batch_size=3), *softmax_closed_form())


def test_class_weight_multiplies_the_penalty_once():
    class_weight = {0: 1.0, 1: 2.0, 2: 0.5}
    logs = softmax_regression().train_on_batch(X, Y, class_weight=class_weight, return_dict=True)
    assert_logs(logs, *softmax_closed_form(w=np.array([class_weight[c] for c in Y])))


def test_sum_reduction_counts_as_the_loss_of_a_batch():
    # The loss is the mean of N times each example's term, so that g_i is N times larger.
    loss = keras.losses.SparseCategoricalCrossentropy(reduction="sum")
    penalty, mean = softmax_closed_form(w=SAMPLE_WEIGHT)
    assert_logs(
        evaluate(regularized(linear("softmax"), loss), X, Y, sample_weight=SAMPLE_WEIGHT), N**2 * penalty, N * mean
    )


@pytest.mark.parametrize("temporal_weights", [False, True])
def test_sequences(temporal_weights):
    x, y = RNG.normal(size=(N, T, D)).astype("float32"), RNG.normal(size=(N, T, K)).astype("float32")
    w = RNG.uniform(0.2, 2.0, (N, T)).astype("float32") if temporal_weights else np.ones((N, T))
    error = x @ W - y
    g = 2 / (T * K) * error @ W.T
    penalty = np.mean(w.mean(axis=1) * (g**2).sum(axis=(1, 2)))
    logs = evaluate(regularized(linear(shape=(T, D)), "mse"), x, y, sample_weight=w if temporal_weights else None)
    assert_logs(logs, penalty, np.mean(w[..., None] * error**2))


def test_masked_steps_do_not_count():
    x, y = RNG.normal(size=(N, T, D)).astype("float32"), RNG.normal(size=(N, T, K)).astype("float32")
    lengths = RNG.integers(1, T + 1, N)
    valid = np.arange(T) < lengths[:, None]
    x[~valid] = 0.0
    model = keras.Sequential([keras.Input((T, D)), layers.Masking(), layers.Dense(K, use_bias=False)])
    model.set_weights([W])
    error = (x @ W - y) * valid[..., None]
    # Keras divides by the number of valid steps in the batch, and the loss is a mean of N contributions.
    g = N * 2 / (valid.sum() * K) * error @ W.T
    assert_logs(
        evaluate(regularized(model, "mse"), x, y),
        np.mean((g**2).sum(axis=(1, 2))),
        (error**2).sum() / (valid.sum() * K),
    )


def test_several_inputs_are_penalized_together_and_integers_left_out():
    a, b, i = keras.Input((D,), name="a"), keras.Input((2,), name="b"), keras.Input((1,), name="i", dtype="int32")
    scale = layers.Flatten()(layers.Embedding(3, 1, embeddings_initializer="ones")(i))
    y_pred = layers.Dense(1, use_bias=False, name="p")(a) + layers.Dense(1, use_bias=False, name="q")(b) * scale
    model = keras.Model({"a": a, "b": b, "i": i}, y_pred)
    p, q = W[:, :1], np.array([[3.0], [4.0]], "float32")
    model.get_layer("p").set_weights([p])
    model.get_layer("q").set_weights([q])
    data = {"a": X, "b": X[:, :2], "i": np.ones((N, 1), "int32")}
    error = X @ p + X[:, :2] @ q
    penalty = np.mean(4 * error**2) * ((p**2).sum() + 25)
    assert_logs(evaluate(regularized(model, "mse"), data, np.zeros((N, 1), "float32")), penalty, np.mean(error**2))


def test_several_outputs_are_counted_once():
    inputs = keras.Input((D,))
    a, b = layers.Dense(1, use_bias=False, name="a"), layers.Dense(1, use_bias=False, name="b")
    model = keras.Model(inputs, [a(inputs), b(inputs)])
    a.set_weights([W[:, :1]])
    b.set_weights([W[:, 1:2]])
    wrapped = regularized(model, {"a": "mse", "b": "mse"}, loss_weights={"a": 1.0, "b": 0.5})
    zeros = np.zeros((N, 1), "float32")
    ya, yb = X @ W[:, :1], X @ W[:, 1:2]
    g = 2 * ya * W[:, 0] + 0.5 * 2 * yb * W[:, 1]
    w = SAMPLE_WEIGHT[:, None]
    logs = evaluate(wrapped, X, [zeros, zeros], sample_weight=SAMPLE_WEIGHT)
    assert_logs(logs, np.mean(w * (g**2).sum(axis=1, keepdims=True)), np.mean(w * (ya**2 + 0.5 * yb**2)))
    np.testing.assert_allclose(logs["a_loss"], np.mean(w * ya**2), rtol=1e-5)
    np.testing.assert_allclose(logs["b_loss"], np.mean(w * yb**2), rtol=1e-5)
    assert np.asarray(wrapped._compile_loss.metrics[0].count) == N


class AddsLoss(layers.Layer):
    def call(self, x):
        self.add_loss(0.1 * ops.sum(ops.square(x)) / N)
        return x


def test_added_losses_are_trained_once_and_not_penalized():
    model = keras.Sequential([keras.Input((D,)), AddsLoss(), layers.Dense(K, use_bias=False)])
    model.set_weights([W])
    error = X @ W
    penalty = np.mean(((2 / K * error @ W.T) ** 2).sum(axis=1))
    added = 0.1 * (X**2).sum() / N
    wrapped = regularized(model, "mse")
    zeros = np.zeros((N, K), "float32")
    assert_logs(evaluate(wrapped, X, zeros), penalty, np.mean(error**2) + added)
    assert_logs(wrapped.train_on_batch(X, zeros, return_dict=True), penalty, np.mean(error**2) + added)


def test_half_precision_keeps_small_gradients(backend):
    # As a mean over the batch in half precision, these gradients of about 1e-6 would be rounded to zero.
    scale = 1e-6
    model = linear(dtype="mixed_float16")
    model.set_weights([np.sign(W)])
    wrapped = InputGradientRegularized(model, WEIGHT, dtype="mixed_float16")
    wrapped.compile("sgd", lambda y, y_pred: scale * ops.sum(ops.cast(y_pred, "float32"), axis=-1))
    logs = wrapped.train_on_batch(np.tile(X, (64, 1)), np.zeros(64 * N, "float32"), return_dict=True)
    penalty = scale**2 * (np.sign(W).sum(axis=1) ** 2).sum()
    np.testing.assert_allclose(logs["input_gradient_penalty"], penalty, rtol=0.05)
    assert wrapped.dtype_policy.name == "mixed_float16"


# --- its gradient ---

MODES = [{"jit_compile": False}, {"run_eagerly": True}, {"jit_compile": True}]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "_".join(mode) + str(*mode.values()))
@pytest.mark.parametrize("weighted", [False, True])
def test_training_follows_the_gradient_of_the_total_loss(mode, weighted):
    model = keras.Sequential([keras.Input((D,)), layers.Dense(4, activation="tanh"), layers.Dense(K)])
    model.set_weights([RNG.normal(size=v.shape) for v in model.weights])
    before = model.get_weights()
    y = RNG.normal(size=(N, K)).astype("float32")
    w = SAMPLE_WEIGHT if weighted else np.ones(N)

    def total(weights):
        a, b, c, d = weights
        h = np.tanh(X @ a + b)
        error = h @ c + d - y
        g = ((2 / K * error) @ c.T * (1 - h**2)) @ a.T
        return np.mean(w * (error**2).mean(axis=1)) + WEIGHT * np.mean(w * (g**2).sum(axis=1))

    learning_rate = 0.01
    wrapped = regularized(model, "mse", optimizer=keras.optimizers.SGD(learning_rate), **mode)
    loss = wrapped.train_on_batch(X, y, sample_weight=w if weighted else None, return_dict=True)["loss"]
    np.testing.assert_allclose(loss, total(before), rtol=1e-5)
    for was, now, g in zip(before, model.get_weights(), central_differences(total, before), strict=True):
        np.testing.assert_allclose((was - now) / learning_rate, g, rtol=2e-4, atol=2e-4)


def test_weight_zero_measures_and_trains_as_the_plain_model():
    plain, wrapped = linear("softmax"), softmax_regression(weight=0)
    plain.compile("sgd", "sparse_categorical_crossentropy")
    expected = plain.fit(X, Y, epochs=3, shuffle=False, verbose=0).history["loss"]
    history = wrapped.fit(X, Y, epochs=3, shuffle=False, verbose=0).history
    np.testing.assert_allclose(history["loss"], expected, rtol=1e-6)
    np.testing.assert_allclose(history["input_gradient_penalty"][0], softmax_closed_form()[0], rtol=1e-5)
    np.testing.assert_allclose(wrapped.get_weights()[0], plain.get_weights()[0], rtol=1e-5)


def test_a_zero_gradient_gives_a_zero_update():
    wrapped = regularized(linear(), "mse")
    logs = wrapped.train_on_batch(X, wrapped.predict(X, verbose=0), return_dict=True)
    np.testing.assert_allclose(logs["input_gradient_penalty"], 0.0, atol=1e-10)
    np.testing.assert_allclose(wrapped.get_weights()[0], W, rtol=1e-6)


def test_training_lowers_the_penalty_and_trains_the_wrapped_model():
    model = linear("softmax")
    wrapped = regularized(model, "sparse_categorical_crossentropy", weight=1.0)
    history = wrapped.fit(X, Y, epochs=20, verbose=0, validation_data=(X, Y)).history
    assert history["input_gradient_penalty"][-1] < 0.7 * history["input_gradient_penalty"][0]
    logs = evaluate(wrapped, X, Y)
    np.testing.assert_allclose(history["val_loss"][-1], logs["loss"], rtol=1e-6)
    np.testing.assert_allclose(history["val_input_gradient_penalty"][-1], logs["input_gradient_penalty"], rtol=1e-6)
    assert wrapped.model is model
    np.testing.assert_allclose(model.predict(X, verbose=0), wrapped.predict(X, verbose=0), rtol=1e-5, atol=1e-6)


# --- one forward pass ---


def test_batch_normalization_is_updated_once():
    model = keras.Sequential([keras.Input((D,)), layers.BatchNormalization(momentum=0.9), layers.Dense(K)])
    regularized(model, "mse").train_on_batch(X, np.zeros((N, K), "float32"))
    np.testing.assert_allclose(model.layers[0].moving_mean, 0.1 * X.mean(axis=0), rtol=1e-5, atol=1e-7)
    assert model(X).shape == (N, K)  # its state holds values, not tracers


def test_dropout_uses_one_mask():
    # With y_pred = sum(mask * x) / keep at x = 1, the penalty of the loss y_pred is y_pred / keep.
    model = keras.Sequential([keras.Input((D,)), layers.Dropout(0.5), layers.Dense(1, use_bias=False)])
    model.set_weights([np.ones((D, 1))])
    wrapped = regularized(model, lambda y, y_pred: y_pred[:, 0])
    logs = wrapped.train_on_batch(np.ones((N, D), "float32"), np.zeros((N, 1), "float32"), return_dict=True)
    assert_logs(logs, logs["input_gradient_penalty"], logs["input_gradient_penalty"] / 2)


def test_nothing_is_kept_between_steps():
    wrapped = softmax_regression()
    for use in (wrapped, lambda x: wrapped.predict(x, verbose=0), lambda x: wrapped(x, training=True)):
        use(X)
        assert wrapped._step.call is None
    wrapped.fit(X, Y, verbose=0)
    evaluate(wrapped, X, Y)
    assert wrapped._step.call is None and not wrapped._step.recording


def test_a_failed_step_leaves_nothing_behind():
    wrapped = regularized(linear(), "mse", run_eagerly=True)
    with pytest.raises(Exception):  # noqa: B017 - the words are Keras'
        wrapped.train_on_batch(X, np.zeros((N, K + 2), "float32"))
    assert wrapped._step.call is None and not wrapped._step.recording
    wrapped.train_on_batch(X, np.zeros((N, K), "float32"))


# --- Keras' loops ---


def tf_data():
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)


def torch_loader():
    data = pytest.importorskip("torch.utils.data")
    torch = pytest.importorskip("torch")
    return data.DataLoader(data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)), batch_size=4)


def generator():
    yield from ((X[:4], Y[:4]), (X[4:], Y[4:]))


@pytest.mark.parametrize("source", [tf_data, torch_loader, generator])
def test_data_sources(source):
    wrapped = softmax_regression()
    assert_logs(wrapped.evaluate(source(), verbose=0, return_dict=True), *softmax_closed_form())
    wrapped.fit(source(), verbose=0)
    expected = softmax_regression()
    expected.fit(X, Y, batch_size=4, shuffle=False, verbose=0)
    np.testing.assert_allclose(wrapped.get_weights()[0], expected.get_weights()[0], rtol=1e-5)


@pytest.mark.parametrize("options", [{"steps_per_execution": 2}, {"optimizer": "accumulating"}], ids=str)
def test_options_of_compile(options, request):
    if "steps_per_execution" in options:
        request.getfixturevalue("needs_steps_per_execution")
    if "optimizer" in options:
        options = {"optimizer": keras.optimizers.SGD(gradient_accumulation_steps=2)}
    wrapped = softmax_regression(**options)
    logs = wrapped.fit(X, Y, batch_size=4, epochs=2, verbose=0).history
    assert logs["loss"][1] < logs["loss"][0]
    assert not np.allclose(wrapped.get_weights()[0], W)


@pytest.mark.usefixtures("needs_steps_per_execution")
def test_steps_per_execution_equals_single_steps():
    one, two = softmax_regression(), softmax_regression(steps_per_execution=2)
    for wrapped in (one, two):
        wrapped.fit(X, Y, batch_size=2, shuffle=False, verbose=0)
    np.testing.assert_allclose(one.get_weights()[0], two.get_weights()[0], rtol=1e-5)


def test_one_inside_another_counts_the_outer_penalty():
    inner = InputGradientRegularized(linear("softmax"), 5.0)
    assert_logs(evaluate(regularized(inner, "sparse_categorical_crossentropy"), X, Y), *softmax_closed_form())


# --- saving ---


def test_save_and_load(tmp_path):
    wrapped = softmax_regression(metrics=["accuracy"])
    wrapped.fit(X, Y, verbose=0)
    wrapped.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.weight == WEIGHT and loaded.model.get_layer("out").units == K
    expected, logs = evaluate(wrapped, X, Y), evaluate(loaded, X, Y)
    assert logs == pytest.approx(expected, rel=1e-6)
    loaded.fit(X, Y, verbose=0)


@pytest.mark.parametrize("copied", [keras.models.clone_model, copy.deepcopy])
def test_copies_have_a_model_of_their_own(copied):
    wrapped = InputGradientRegularized(linear("softmax"), WEIGHT, name="robust")
    other = copied(wrapped)
    assert other.model is not wrapped.model and other.weight == WEIGHT
    other.set_weights(wrapped.get_weights())
    other.compile("sgd", "sparse_categorical_crossentropy")
    assert_logs(evaluate(other, X, Y), *softmax_closed_form())


def test_config_round_trip():
    config = InputGradientRegularized(linear(), WEIGHT, name="robust", dtype="mixed_float16").get_config()
    again = InputGradientRegularized.from_config(config)
    assert (again.name, again.weight, again.dtype_policy.name) == ("robust", WEIGHT, "mixed_float16")
    assert [v.shape for v in again.weights] == [(D, K)]


# --- bad input ---


class Unbuilt(keras.Model):
    pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: (layers.Dense(1), 0.1), "expects a keras.Model as `model`. Received: model=<Dense"),
        (lambda: ("model", 0.1), "expects a keras.Model as `model`. Received: model='model'"),
        (lambda: (Unbuilt(name="raw"), 0.1), "expects a built model. Received: the unbuilt model 'raw'"),
        (lambda: (keras.Sequential([layers.Dense(1)], name="raw"), 0.1), "the unbuilt model 'raw'"),
        (lambda: (linear(), -0.1), "a finite number of 0 or more, or a keras.optimizers.schedules"),
        (lambda: (linear(), float("nan")), "Received: weight=nan"),
        (lambda: (linear(), float("inf")), "Received: weight=inf"),
        (lambda: (linear(), "0.1"), "Received: weight='0.1'"),
        (lambda: (linear(), True), "Received: weight=True"),
        (lambda: (linear(), None), "Received: weight=None"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError) as error:
        InputGradientRegularized(*arguments())
    assert message in str(error.value)


def embedding_model(dtype):
    return keras.Sequential([keras.Input((T,), dtype=dtype), layers.Embedding(9, 2), layers.Flatten(), layers.Dense(1)])


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("int32", "inputs without a gradient"),
        # Keras' own default: indices that travel as floats.
        ("float32", "inputs that the target does not depend on differentiably"),
    ],
)
def test_indices_have_no_gradient(dtype, message):
    model = embedding_model(dtype)
    with pytest.raises(ValueError, match="penalize the output of the embedding") as error:
        regularized(model, "mse").train_on_batch(np.ones((N, T), dtype), np.zeros((N, 1), "float32"))
    assert message in str(error.value)
    assert model.predict(np.ones((N, T), dtype), verbose=0).shape == (N, 1)


def test_no_compiled_loss():
    model = keras.Sequential([keras.Input((D,)), layers.ActivityRegularization(l2=0.1)])
    with pytest.raises(ValueError, match="gradient of the compiled loss and expects a `loss`"):
        regularized(model, None).train_on_batch(X)


def test_predictions_changed_on_the_way_to_the_loss():
    class Rescaled(InputGradientRegularized):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return super().compute_loss(x, y, 2 * y_pred, sample_weight, training)

    wrapped = Rescaled(linear(), WEIGHT)
    wrapped.compile("sgd", "mse")
    with pytest.raises(ValueError, match="exactly the `y_pred` that the last call"):
        wrapped.train_on_batch(X, np.zeros((N, K), "float32"))
