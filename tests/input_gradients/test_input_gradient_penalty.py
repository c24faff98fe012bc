"""`input_gradient_penalty` against NumPy: input gradients by complex steps, those of the weights by differences."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from keras.src.backend.common import dtypes

import keras_gradtools as kg
from keras_gradtools.keras_internals import scopes
from keras_gradtools.keras_internals.layers import set_keras_mask
from tests.cases import tensor
from tests.input_gradients.reference import Reference, assert_equal_to, directions_of, norm_of, numpy

penalty_of = kg.regularization.input_gradient_penalty

RNG = np.random.default_rng(0)
N, D, H, K, T = 4, 3, 4, 2, 3
X = RNG.normal(size=(N, D))
Y = np.eye(K)[[0, 1, 1, 0]]
WEIGHTS = [RNG.normal(size=s) for s in ((D, H), (H,), (H, K), (K,))]
KERNEL = RNG.normal(size=(D, K))
# Single precision holds them exactly.
SAMPLE_WEIGHT = np.array([0.5, 2.0, 1.25, 0.125])
NORMS = [1, 2, "inf"]


@pytest.fixture
def double_precision(monkeypatch):
    """Lets Keras compute in double precision: on JAX and torch its operations cast what is double down."""
    monkeypatch.setitem(dtypes.BIT64_TO_BIT32_DTYPE, "float64", "float64")
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


in_double_precision = [pytest.mark.float64, pytest.mark.usefixtures("double_precision")]


def each(*marks):
    return lambda test: [test := mark(test) for mark in marks][-1]


in_double = each(*in_double_precision)


def value_and_gradient(model, *args, variables=None, **kwargs):
    with kg.GradientTape() as tape:
        value = penalty_of(model, *args, **kwargs)
    variables = model.trainable_variables if variables is None else variables
    gradients = tape.gradient(value, variables, unconnected_gradients="zero")
    return numpy(value), [numpy(g) for g in gradients]


def perceptron(weights=WEIGHTS, activation="tanh", **kwargs):
    shapes = [w.shape for w in weights]
    model = keras.Sequential(
        [
            keras.Input((shapes[0][0],)),
            layers.Dense(shapes[0][1], activation=activation),
            layers.Dense(shapes[2][1], **kwargs),
        ]
    )
    model.set_weights(weights)
    return model


def forward(weights, xs):
    a, b, c, d = weights
    return np.tanh(xs[0] @ a + b) @ c + d


def cross_entropy(z, y=Y):
    return ((np.log(np.exp(z).sum(axis=-1, keepdims=True)) - z) * y).sum(axis=-1, keepdims=True)


def score(y, y_pred):
    return ops.sum(ops.cast(y, y_pred.dtype) * ops.sin(y_pred), axis=-1)


VALUES = {
    "loss": lambda weights, xs: cross_entropy(forward(weights, xs)),
    "outputs": forward,
    "function": lambda weights, xs: (Y * np.sin(forward(weights, xs))).sum(axis=-1, keepdims=True),
}
TARGETS = {"loss": "loss", "outputs": "outputs", "function": score}


def loss_of_examples():
    return keras.losses.CategoricalCrossentropy(from_logits=True)


def test_the_reference_of_a_linear_model():
    reference = Reference(lambda weights, xs: xs[0] @ weights[0], [KERNEL], [X])
    np.testing.assert_allclose(reference([KERNEL]), (KERNEL**2).sum(), rtol=1e-12)
    np.testing.assert_allclose(reference.gradient()[0], 2 * KERNEL, rtol=1e-6)


# --- the value and its gradient ---


def penalties():
    """All norms, squared or not, around each center; some of them, which take long together, in slow tests only."""
    for norm in NORMS:
        for squared in (True, False):
            for center in (0.0, 0.7):
                is_slow = norm != 2 and squared != bool(center)
                marks = [pytest.mark.slow] if is_slow else []
                yield pytest.param(norm, squared, center, marks=marks)


METHODS_AND_TARGETS = [
    *[(method, target) for method in ("exact", "finite_difference") for target in TARGETS],
    ("random_projection", "outputs"),
]


@in_double
@pytest.mark.parametrize(("norm", "squared", "center"), penalties())
@pytest.mark.parametrize(("method", "target"), METHODS_AND_TARGETS)
def test_value_and_gradient(method, target, norm, squared, center):
    options = {"norm": norm, "squared": squared, "center": center}
    step_size = 0.2 if method == "finite_difference" else None
    reference = Reference(VALUES[target], WEIGHTS, [X], step_size=step_size, **options)
    found = value_and_gradient(
        perceptron(),
        X,
        Y,
        loss=loss_of_examples(),
        target=TARGETS[target],
        method=method,
        step_size=step_size or 0.1,
        projections=-1,
        **options,
    )
    assert_equal_to(reference, found)


@in_double
@pytest.mark.parametrize("method", ["random_projection", "finite_difference"])
@pytest.mark.parametrize("count", [1, 3])
def test_projections_with_a_fixed_seed(method, count):
    drawn = numpy(keras.random.normal((count, N, K), seed=7))
    mixtures = np.sqrt(K / count) * drawn / np.sqrt((drawn**2).sum(axis=2, keepdims=True))
    reference = Reference(
        lambda weights, xs: np.einsum("pnk,nk->np", mixtures, forward(weights, xs)),
        WEIGHTS,
        [X],
        step_size=0.2 if method == "finite_difference" else None,
    )
    options = {"target": "outputs", "method": method, "step_size": 0.2, "projections": count, "seed": 7}
    assert_equal_to(reference, value_and_gradient(perceptron(), X, **options))


@in_double
@pytest.mark.parametrize("method", ["exact", "finite_difference"])
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum"])
def test_sample_weights_and_reductions(method, reduction):
    # The loss is the mean of l_i: with the sum over the batch, l_i is N times as large.
    factor = N if reduction == "sum" else 1
    options = {"step_size": 0.2} if method == "finite_difference" else {}
    reference = Reference(
        lambda weights, xs: factor * cross_entropy(forward(weights, xs)),
        WEIGHTS,
        [X],
        sample_weight=SAMPLE_WEIGHT,
        **options,
    )
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, reduction=reduction)
    for shape in [(N,), (N, 1)]:
        weights = SAMPLE_WEIGHT.reshape(shape)
        found = value_and_gradient(perceptron(), X, Y, loss=loss, sample_weight=weights, method=method, **options)
        assert_equal_to(reference, found)


@in_double
@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_a_loss_of_the_whole_batch(method):
    def loss(y, y_pred):
        return ops.mean(ops.square(y - y_pred))

    def values(weights, xs):
        return ((Y - forward(weights, xs)) ** 2).mean(axis=1, keepdims=True)

    if method == "exact":
        assert_equal_to(Reference(values, WEIGHTS, [X]), value_and_gradient(perceptron(), X, Y, loss=loss))
        return
    with pytest.raises(ValueError, match="one number for the whole batch"):
        penalty_of(perceptron(), X, Y, loss=loss, method=method)


VALID = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 1, 0]], bool)
SEQUENCES = RNG.normal(size=(N, T, D)) * VALID[..., None]
LABELS = RNG.normal(size=(N, T, K))


def masked_model():
    model = keras.Sequential(
        [keras.Input((T, D)), layers.Masking(), layers.Dense(H, activation="tanh"), layers.Dense(K)]
    )
    model.set_weights(WEIGHTS)
    return model


def masked_values(target):
    def values(weights, xs):
        z = forward(weights, [xs[0] * VALID[..., None]])
        if target == "outputs":
            return (z * VALID[..., None]).reshape(N, -1)
        error = ((z - LABELS) ** 2).mean(axis=-1) * VALID
        # Keras divides by the number of valid steps in the batch.
        return N * error.sum(axis=1, keepdims=True) / VALID.sum()

    return values


@in_double
@pytest.mark.parametrize("method", ["exact", "finite_difference"])
@pytest.mark.parametrize("target", ["loss", "outputs"])
def test_masks(target, method):
    step_size = 0.2 if method == "finite_difference" else None
    temporal = np.arange(1.0, 1 + N * T).reshape(N, T) / 8
    weights = (temporal * VALID).sum(axis=1) / VALID.sum(axis=1)
    reference = Reference(
        masked_values(target), WEIGHTS, [SEQUENCES], sample_weight=weights, step_size=step_size, norm=2
    )
    found = value_and_gradient(
        masked_model(),
        SEQUENCES,
        LABELS,
        loss="mse",
        target=target,
        sample_weight=temporal,
        method=method,
        step_size=0.2,
        projections=-1,
    )
    assert_equal_to(reference, found)


@in_double
@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_the_mask_of_an_input(method):
    x = tensor(SEQUENCES, "float64")
    set_keras_mask(x, ops.convert_to_tensor(VALID))
    model = keras.Sequential([keras.Input((T, D)), layers.Dense(H, activation="tanh"), layers.Dense(K)])
    model.set_weights(WEIGHTS)
    step_size = 0.2 if method == "finite_difference" else None
    reference = Reference(masked_values("loss"), WEIGHTS, [SEQUENCES], step_size=step_size)
    assert_equal_to(reference, value_and_gradient(model, x, LABELS, loss="mse", method=method, step_size=0.2))


# --- several inputs and outputs ---

A, B, INDICES = RNG.normal(size=(N, D)), RNG.normal(size=(N, 2, 2)), np.array([0, 1, 2, 1])
TWO_INPUTS = [RNG.normal(size=s) for s in ((3, 1), (D, H), (4, H), (H, K))]


def several_inputs(as_list=False):
    a, b, i = keras.Input((D,), name="a"), keras.Input((2, 2), name="b"), keras.Input((), name="i", dtype="int32")
    scale = layers.Embedding(3, 1, name="scale")
    first, second = layers.Dense(H, use_bias=False), layers.Dense(H, use_bias=False)
    last = layers.Dense(K, use_bias=False)
    hidden = ops.tanh(first(a) + second(layers.Flatten()(b))) * scale(i)
    model = keras.Model([a, b, i] if as_list else {"a": a, "b": b, "i": i}, last(hidden))
    for layer, w in zip((scale, first, second, last), TWO_INPUTS, strict=True):
        layer.set_weights([w])
    return model, [layer.trainable_variables[0] for layer in (scale, first, second, last)]


def values_of_several(chosen):
    def values(weights, xs):
        given = {"a": A, "b": B, **dict(zip(chosen, xs, strict=True))}
        scale, first, second, last = weights
        return cross_entropy((np.tanh(given["a"] @ first + given["b"].reshape(N, 4) @ second) * scale[INDICES]) @ last)

    return values


@in_double
@pytest.mark.parametrize("method", ["exact", "finite_difference"])
@pytest.mark.parametrize(
    ("inputs", "chosen"),
    [(None, "ab"), ("a", "a"), (["b"], "b"), (0, "a"), ((1,), "b"), (["b", 0], "ab"), (["a", "b", "a"], "ab")],
    ids=str,
)
@pytest.mark.parametrize("as_list", [False, True], ids=["dict", "list"])
def test_several_inputs(as_list, inputs, chosen, method):
    model, variables = several_inputs(as_list)
    step_size = 0.2 if method == "finite_difference" else None
    xs = [{"a": A, "b": B}[name] for name in chosen]
    reference = Reference(values_of_several(chosen), TWO_INPUTS, xs, step_size=step_size)
    x = [A, B, INDICES] if as_list else {"a": A, "b": B, "i": INDICES}
    options = {"loss": loss_of_examples(), "inputs": inputs, "method": method, "step_size": 0.2}
    assert_equal_to(reference, value_and_gradient(model, x, Y, variables=variables, **options))


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_an_input_without_influence_counts_as_zero(method):
    def model(xs):
        return ops.matmul(xs[0], ops.convert_to_tensor(KERNEL.astype("float32")))

    x = [X.astype("float32"), A.astype("float32")]
    found = penalty_of(model, x, target="outputs", method=method, projections=-1)
    np.testing.assert_allclose(numpy(found), (KERNEL**2).sum(), rtol=1e-5)


TWO_OUTPUTS = [RNG.normal(size=s) for s in ((D, K), (K,), (D, 1), (1,))]


def two_outputs(y_pred_names=("p", "q")):
    inputs = keras.Input((D,))
    heads = [layers.Dense(n, name=name, activation="tanh") for n, name in zip((K, 1), y_pred_names, strict=True)]
    model = keras.Model(inputs, {name: head(inputs) for name, head in zip(y_pred_names, heads, strict=True)})
    for i, head in enumerate(heads):
        head.set_weights(TWO_OUTPUTS[2 * i : 2 * i + 2])
    return model, [v for head in heads for v in head.trainable_variables]


@in_double
@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_a_compiled_model_with_several_losses(method):
    model, variables = two_outputs()
    model.compile("sgd", {"p": "mse", "q": keras.losses.LogCosh()}, loss_weights={"p": 0.3, "q": 2.0})
    y = {"p": Y, "q": X[:, :1]}

    def values(weights, xs):
        p, q = (np.tanh(xs[0] @ weights[i] + weights[i + 1]) for i in (0, 2))
        return 0.3 * ((Y - p) ** 2).mean(axis=1, keepdims=True) + 2 * np.log(np.cosh(q - X[:, :1]))

    step_size = 0.2 if method == "finite_difference" else None
    # One weight for each output: the mean of the two counts.
    given = {"p": SAMPLE_WEIGHT, "q": SAMPLE_WEIGHT[::-1].copy()}
    reference = Reference(
        values, TWO_OUTPUTS, [X], step_size=step_size, sample_weight=(SAMPLE_WEIGHT + SAMPLE_WEIGHT[::-1]) / 2
    )
    found = value_and_gradient(model, X, y, sample_weight=given, method=method, step_size=0.2, variables=variables)
    assert_equal_to(reference, found)


@in_double
@pytest.mark.parametrize("method", ["exact", "finite_difference", "random_projection"])
def test_the_jacobian_of_all_outputs(method):
    model, variables = two_outputs()

    def values(weights, xs):
        return np.concatenate([np.tanh(xs[0] @ weights[i] + weights[i + 1]) for i in (0, 2)], axis=1)

    step_size = 0.2 if method == "finite_difference" else None
    reference = Reference(values, TWO_OUTPUTS, [X], norm=1, step_size=step_size)
    options = {"target": "outputs", "norm": 1, "method": method, "step_size": 0.2, "projections": -1}
    assert_equal_to(reference, value_and_gradient(model, X, variables=variables, **options))


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_a_loss_compiled_and_not_yet_used_still_trains_and_logs(method):
    model, _ = two_outputs()
    model.compile("sgd", {"p": "mse", "q": "mse"})
    x, y = X.astype("float32"), {"p": Y.astype("float32"), "q": X[:, :1].astype("float32")}
    penalty_of(model, x, y, method=method)
    logs = model.evaluate(x, y, verbose=0, return_dict=True)
    for name, i in (("p", 0), ("q", 2)):
        error = np.tanh(X @ TWO_OUTPUTS[i] + TWO_OUTPUTS[i + 1]) - y[name]
        np.testing.assert_allclose(logs[f"{name}_loss"], np.mean(error**2), rtol=1e-5)


def test_a_loss_of_the_whole_batch_beside_one_of_examples():
    # A number for the batch cannot be added to those of the examples.
    model, _ = two_outputs()
    model.compile("sgd", {"p": "mse", "q": lambda y, y_pred: ops.mean(y_pred**2)})
    x, y = X.astype("float32"), {"p": Y.astype("float32"), "q": X[:, :1].astype("float32")}
    with pytest.raises(ValueError, match="one number for the whole batch"):
        penalty_of(model, x, y, method="finite_difference")


# --- batch normalization, dropout ---

MOVING = [RNG.normal(size=D), RNG.uniform(0.5, 2, D)]
NORMALIZED = [RNG.uniform(0.5, 2, D), RNG.normal(size=D), KERNEL]


@in_double
@pytest.mark.parametrize("method", ["exact", "finite_difference"])
@pytest.mark.parametrize("target", ["loss", "outputs", pytest.param("function", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("frozen", "training"), [(False, True), (True, True), (False, False), (True, False)])
def test_batch_normalization(frozen, training, target, method):
    normalization = layers.BatchNormalization(epsilon=1e-3)
    model = keras.Sequential([keras.Input((D,)), normalization, layers.Dense(K, use_bias=False, activation="tanh")])
    model.set_weights([*NORMALIZED[:2], *MOVING, KERNEL])

    def values(weights, xs):
        x, (scale, shift, kernel) = xs[0], weights
        mean, variance = MOVING
        if training and not frozen:
            mean = x.mean(axis=0)
            variance = ((x - mean) ** 2).mean(axis=0)
        z = np.tanh(((x - mean) / np.sqrt(variance + 1e-3) * scale + shift) @ kernel)
        return {
            "loss": lambda: cross_entropy(z),
            "outputs": lambda: z,
            "function": lambda: (Y * np.sin(z)).sum(axis=1, keepdims=True),
        }[target]()

    step_size = 0.2 if method == "finite_difference" else None
    reference = Reference(values, NORMALIZED, [X], step_size=step_size)
    found = value_and_gradient(
        model,
        X,
        Y,
        loss=loss_of_examples(),
        target=TARGETS[target],
        method=method,
        step_size=0.2,
        projections=-1,
        frozen_statistics=frozen,
        training=training,
    )
    assert_equal_to(reference, found)
    assert normalization.trainable and all(v.trainable for v in normalization.trainable_variables)
    np.testing.assert_array_equal(numpy(normalization.moving_mean), MOVING[0])


def first_output(y, y_pred):
    return y_pred[:, 0]


def dropped_sum(seed, kind="dropout", size=20):
    dropout = {
        "dropout": lambda: layers.Dropout(0.5, seed=seed),
        "shaped": lambda: layers.Dropout(0.5, noise_shape=(None, size), seed=seed),
        "gaussian": lambda: layers.GaussianDropout(0.5, seed=seed),
    }[kind]()
    model = keras.Sequential([keras.Input((size,)), dropout, layers.Dense(1, use_bias=False)])
    model.set_weights([np.ones((size, 1))])
    return model


@pytest.mark.parametrize("as_function", [False, True], ids=["model", "function"])
@pytest.mark.parametrize("method", ["exact", "finite_difference"])
@pytest.mark.parametrize(("kind", "seed"), [("dropout", None), ("dropout", 3), ("shaped", None), ("gaussian", None)])
def test_dropout_has_one_mask_and_it_is_that_of_the_next_call(kind, seed, method, as_function):
    model = dropped_sum(seed, kind)
    called = (lambda x: model(x, training=True)) if as_function else model
    found = penalty_of(called, np.ones((N, 20), "float32"), target=first_output, method=method)
    # The gradient of sum(m x) is the mask m, which the next call draws as well, for nothing was changed.
    mask = numpy(model.layers[0](ops.ones((N, 20)), training=True))
    if kind != "gaussian":
        assert set(np.unique(mask)) == {0, 2}
    np.testing.assert_allclose(numpy(found), (mask**2).sum(axis=1).mean(), rtol=1e-4)


@in_double
@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_dropout_and_frozen_statistics_share_the_mask(method):
    dropout = layers.Dropout(0.5, seed=4)
    model = keras.Sequential(
        [keras.Input((D,)), dropout, layers.BatchNormalization(epsilon=1e-3), layers.Dense(K, use_bias=False)]
    )
    model.set_weights([*NORMALIZED[:2], *MOVING, *dropout.get_weights(), KERNEL][: len(model.weights)])
    for v, w in zip(model.trainable_variables, NORMALIZED, strict=True):
        v.assign(w)
    model.layers[1].moving_mean.assign(MOVING[0])
    model.layers[1].moving_variance.assign(MOVING[1])
    options = {"loss": loss_of_examples(), "method": method, "step_size": 0.2, "frozen_statistics": True}
    found = value_and_gradient(model, X, Y, **options)
    mask = numpy(dropout(ops.ones((N, D), dtype="float64"), training=True))

    def values(weights, xs):
        scale, shift, kernel = weights
        normal = (xs[0] * mask - MOVING[0]) / np.sqrt(MOVING[1] + 1e-3)
        return cross_entropy((normal * scale + shift) @ kernel)

    reference = Reference(values, NORMALIZED, [X], step_size=0.2 if method == "finite_difference" else None)
    assert_equal_to(reference, found)


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


# --- degenerate gradients ---


def integer_model():
    """Its numbers are small integers, so that a loss of zero is one without rounding."""
    model = keras.Sequential([keras.Input((D,)), layers.Dense(K, use_bias=False)])
    kernel = np.arange(D * K).reshape(D, K) - 2.0
    model.set_weights([kernel])
    x = np.arange(N * D).reshape(N, D) - 5.0
    return model, x.astype("float32"), (x @ kernel).astype("float32"), kernel


@pytest.mark.parametrize(("squared", "center"), [(True, 0.0), (True, 0.7), (False, 0.0)])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_zero_gradients_have_zero_norm_and_no_update(method, norm, squared, center):
    model, x, y, _ = integer_model()
    options = {"loss": "mse", "method": method, "norm": norm, "squared": squared, "center": center}
    value, (gradient,) = value_and_gradient(model, x, y, **options)
    np.testing.assert_allclose(value, center**2 if squared else center, rtol=1e-6)
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", ["exact", "finite_difference", "random_projection"])
def test_a_zero_jacobian(method, norm, squared):
    model, x, *_ = integer_model()
    model.set_weights([np.zeros((D, K))])
    options = {"target": "outputs", "method": method, "projections": -1, "norm": norm, "squared": squared}
    value, (gradient,) = value_and_gradient(model, x, **options)
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_examples_without_a_gradient_leave_the_others_alone(method, norm):
    model, x, y, kernel = integer_model()
    y[0] += [1, 3]
    g = 2 / K * (x @ kernel - y) @ kernel.T
    value, (gradient,) = value_and_gradient(model, x, y, loss="mse", method=method, norm=norm, step_size=1e-2)
    # The loss is a parabola along x, of curvature 2/K |d W|^2.
    d = directions_of(g[:1], norm)
    q = norm_of(g[:1], norm) + (1e-2 / K * ((d @ kernel) ** 2).sum(axis=1) if method == "finite_difference" else 0)
    np.testing.assert_allclose(value, q[0] ** 2 / N, rtol=1e-3)
    assert np.isfinite(gradient).all() and abs(gradient).max() > 0


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
@pytest.mark.parametrize("norm", NORMS)
def test_tiny_gradients_do_not_underflow(norm, method):
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1, use_bias=False)])
    model.set_weights([np.array([[3.0], [-4.0]])])

    def target(y, y_pred):
        return 1e-25 * y_pred[:, 0]

    options = {"target": target, "norm": norm, "squared": False, "method": method}
    value, (gradient,) = value_and_gradient(model, np.zeros((N, 2), "float32"), **options)
    np.testing.assert_allclose(value, {1: 7e-25, 2: 5e-25, "inf": 4e-25}[norm], rtol=1e-5)
    direction = {1: [1, -1], 2: [0.6, -0.8], "inf": [0, -1]}[norm]
    np.testing.assert_allclose(gradient[:, 0], 1e-25 * np.array(direction), rtol=1e-5, atol=1e-32)


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_a_kink_under_finite_differences_moves(method):
    # y = relu(x - b): exact differences see the slope alone, finite ones how far the kink is.
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1, activation="relu")])
    model.set_weights([np.ones((1, 1)), np.array([-0.5])])
    x = np.array([[0.6]], "float32")
    found = value_and_gradient(model, x, target=first_output, method=method, step_size=0.5)
    assert found[0] == pytest.approx(1.0)
    negative = np.array([[-1.0]])
    model.set_weights([negative, np.array([0.7])])
    found = value_and_gradient(model, x, target=first_output, method=method, step_size=0.5)
    # y(0.6) = 0.1, and y grows towards smaller x by the whole step.
    assert found[0] == pytest.approx(1.0)


# --- random projections ---


def orthogonal_model(size=4, scale=0.5):
    kernel = scale * np.linalg.qr(np.random.default_rng(1).normal(size=(size, size)))[0]
    model = keras.Sequential([keras.Input((size,)), layers.Dense(size, use_bias=False)])
    model.set_weights([kernel])
    return model


@pytest.mark.parametrize("method", ["random_projection", "finite_difference"])
@pytest.mark.parametrize("count", [1, 5])
def test_any_projection_of_an_isometry_gives_its_norm(count, method):
    # |v' J| is 0.5 for each unit vector v, so that no chance is left.
    x = np.random.default_rng(2).normal(size=(3, 4)).astype("float32")
    for seed in range(2):
        options = {"target": "outputs", "method": method, "projections": count, "seed": seed}
        np.testing.assert_allclose(numpy(penalty_of(orthogonal_model(), x, **options)), 4 * 0.25, rtol=2e-4)


@pytest.mark.parametrize(
    ("method", "count"), [("random_projection", 1), ("random_projection", 3), ("finite_difference", 1)]
)
def test_projections_are_unbiased(count, method):
    inputs = keras.Input((D,))
    # Mixtures of two alike outputs that were drawn alike would add up to twice their size.
    heads = [layers.Dense(K, use_bias=False) for _ in range(2)]
    model = keras.Model(inputs, [head(inputs) for head in heads])
    kernels = [KERNEL, 2 * KERNEL]
    for head, kernel in zip(heads, kernels, strict=True):
        head.set_weights([kernel])
    x = np.zeros((500, D), "float32")
    estimates = [
        numpy(penalty_of(model, x, target="outputs", method=method, projections=count, seed=seed)) for seed in range(16)
    ]
    error = np.std(estimates, ddof=1) / np.sqrt(len(estimates))
    expected = sum((kernel**2).sum() for kernel in kernels)
    assert 0 < error < 0.02 * expected
    assert abs(np.mean(estimates) - expected) < 4 * error


@pytest.mark.parametrize("method", ["random_projection", "finite_difference"])
class TestSeeds:
    def estimates(self, method, seeds):
        model = perceptron()
        return [
            float(numpy(penalty_of(model, X.astype("float32"), target="outputs", method=method, seed=seed)))
            for seed in seeds
        ]

    def test_the_same_number_gives_the_same_value(self, method):
        a, b, c = self.estimates(method, [3, 3, 4])
        # Not equal: a sum's last bit follows where its operands lie in memory.
        assert a == pytest.approx(b, rel=1e-6)
        assert a != pytest.approx(c, rel=1e-3)

    @pytest.mark.parametrize("seed", [None, "generator"])
    def test_a_generator_goes_on(self, method, seed):
        seed = keras.random.SeedGenerator(1) if seed else None
        one, two, three = self.estimates(method, [seed] * 3)
        assert min(abs(one - two), abs(one - three), abs(two - three)) > 1e-3 * abs(one)

    def test_equal_generators_give_equal_values(self, method):
        one, two = (self.estimates(method, [keras.random.SeedGenerator(5)] * 2) for _ in range(2))
        assert one == pytest.approx(two, rel=1e-6)


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
        ({"inputs": "image"}, "was given an input in `inputs` that the model does not have. Received: 'image' of "),
        ({"inputs": 1}, "was given an input in `inputs` that the model does not have. Received: 1 of "),
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
