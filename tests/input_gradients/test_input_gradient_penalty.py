"""`input_gradient_penalty` against NumPy: input gradients by complex steps, those of the weights by differences."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from keras.src.backend.common import dtypes

from keras_gradtools.keras_internals.layers import set_keras_mask
from tests.cases import tensor
from tests.input_gradients.perceptron import (
    INDICES,
    KERNEL,
    NORMS,
    RNG,
    SAMPLE_WEIGHT,
    TARGETS,
    TWO_INPUTS,
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
    cross_entropy,
    forward,
    loss_of_examples,
    penalty_of,
    perceptron,
    several_inputs,
    value_and_gradient,
)
from tests.input_gradients.reference import Reference, assert_equal_to, directions_of, norm_of, numpy


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


def test_the_reference_of_a_linear_model():
    reference = Reference(lambda weights, xs: xs[0] @ weights[0], [KERNEL], [X])
    np.testing.assert_allclose(reference([KERNEL]), (KERNEL**2).sum(), rtol=1e-12)
    np.testing.assert_allclose(reference.gradient()[0], 2 * KERNEL, rtol=1e-6)


# --- the value and its gradient ---


def penalties():
    """All norms, squared or not, around each center; in fast tests each norm, with both ways and both centers."""
    fast = [(2, True, 0.0), (2, False, 0.7), (1, False, 0.0), ("inf", True, 0.7)]
    for norm in NORMS:
        for squared in (True, False):
            for center in (0.0, 0.7):
                marks = [] if (norm, squared, center) in fast else [pytest.mark.slow]
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


CHOICES = [(None, "ab"), ("a", "a"), (["b"], "b"), (0, "a"), ((1,), "b"), (["b", 0], "ab"), (["a", "b", "a"], "ab")]


def values_of_several(chosen):
    def values(weights, xs):
        given = {"a": A, "b": B, **dict(zip(chosen, xs, strict=True))}
        scale, first, second, last = weights
        return cross_entropy((np.tanh(given["a"] @ first + given["b"].reshape(N, 4) @ second) * scale[INDICES]) @ last)

    return values


@in_double
@pytest.mark.parametrize(
    ("inputs", "chosen", "as_list", "method"),
    [
        *[(inputs, chosen, as_list, "exact") for inputs, chosen in CHOICES for as_list in (False, True)],
        *[(*CHOICES[i], as_list, "finite_difference") for i, as_list in ((0, False), (0, True), (1, False), (5, True))],
    ],
    ids=str,
)
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
@pytest.mark.parametrize(
    ("frozen", "training", "target"),
    [
        *[(frozen, training, "loss") for frozen in (False, True) for training in (False, True)],
        (False, True, "outputs"),
        (True, True, "outputs"),
        pytest.param(False, True, "function", marks=pytest.mark.slow),
        pytest.param(True, True, "function", marks=pytest.mark.slow),
    ],
)
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


@pytest.mark.parametrize(
    ("kind", "seed", "as_function"),
    [
        ("dropout", None, False),
        ("dropout", None, True),
        ("dropout", 3, False),
        ("shaped", None, True),
        ("gaussian", None, False),
    ],
)
@pytest.mark.parametrize("method", ["exact", "finite_difference"])
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


# --- degenerate gradients ---


def integer_model():
    """Its numbers are small integers, so that a loss of zero is one without rounding."""
    model = keras.Sequential([keras.Input((D,)), layers.Dense(K, use_bias=False)])
    kernel = np.arange(D * K).reshape(D, K) - 2.0
    model.set_weights([kernel])
    x = np.arange(N * D).reshape(N, D) - 5.0
    return model, x.astype("float32"), (x @ kernel).astype("float32"), kernel


@pytest.mark.parametrize(
    ("norm", "squared", "center"),
    [(2, True, 0.0), (2, True, 0.7), (2, False, 0.0), (1, False, 0.0), ("inf", True, 0.7)],
)
@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_zero_gradients_have_zero_norm_and_no_update(method, norm, squared, center):
    model, x, y, _ = integer_model()
    options = {"loss": "mse", "method": method, "norm": norm, "squared": squared, "center": center}
    value, (gradient,) = value_and_gradient(model, x, y, **options)
    np.testing.assert_allclose(value, center**2 if squared else center, rtol=1e-6)
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@pytest.mark.parametrize(("norm", "squared"), [(2, True), (2, False), (1, False), ("inf", True)])
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
