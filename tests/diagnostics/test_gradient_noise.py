"""`gradient_noise_scale` against closed forms, and against the gradient of each example by itself."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.diagnostics import gradient_noise_scale
from tests.compilers import compiled_by

RNG = np.random.default_rng(22)
N, D = 23, 4
X = RNG.normal(size=(N, D)).astype("float32")
Y = (X.sum(axis=1, keepdims=True) + RNG.normal(size=(N, 1))).astype("float32")
W = RNG.uniform(0.5, 2.0, size=N).astype("float32")


def linear(**kwargs):
    model = keras.Sequential([keras.Input((D,)), layers.Dense(1, use_bias=False, **kwargs)])
    model.set_weights([np.linspace(-1, 1, D).reshape(D, 1)])
    return model


def of_gradients(gradients):
    """The three numbers of McCandlish et al., from the gradients in rows."""
    mean = gradients.mean(axis=0)
    trace = ((gradients - mean) ** 2).sum() / (len(gradients) - 1)
    squared = mean @ mean - trace / len(gradients)
    return trace / squared if squared > 0 else np.inf, trace, squared


def check(found, gradients, rel=1e-4):
    assert (found.noise_scale, found.covariance_trace, found.squared_norm) == pytest.approx(
        of_gradients(gradients), rel=rel
    )
    assert found.examples == len(gradients)


def of_linear(weight=1.0):
    w = np.linspace(-1, 1, D)
    x = X.astype("float64")
    return 2 * (np.asarray(weight) * (x @ w - Y[:, 0]))[:, None] * x


@pytest.mark.parametrize("options", [{}, {"chunk_size": 5}, {"batch_size": 6}, {"batch_size": 7, "chunk_size": 3}])
def test_linear_regression(options):
    check(gradient_noise_scale(linear(), "mse", (X, Y), **options), of_linear())


def test_sample_weights():
    check(gradient_noise_scale(linear(), "mse", (X, Y, W)), of_linear(W))


def test_the_compiled_loss_and_a_regularizer():
    model = linear(kernel_regularizer=keras.regularizers.L2(0.3))
    model.compile("sgd", "mse")
    check(gradient_noise_scale(model, None, (X, Y)), of_linear() + 0.6 * np.linspace(-1, 1, D))


def test_batches_of_a_data_set():
    data = [(X[:10], Y[:10]), (X[10:], Y[10:])]
    check(gradient_noise_scale(linear(), "mse", data, chunk_size=4), of_linear())


@pytest.mark.parametrize("variables", [None, "head"])
def test_a_network_example_by_example(variables):
    model = keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Conv2D(3, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, name="head"),
        ]
    )
    x, y = RNG.normal(size=(9, 6, 6, 1)).astype("float32"), RNG.integers(0, 3, 9)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    chosen = model.trainable_variables if variables is None else model.get_layer(variables).trainable_variables
    rows = []
    for i in range(len(x)):
        with kg.GradientTape() as tape:
            value = loss(y[i : i + 1], model(x[i : i + 1]))
        gradients = tape.gradient(value, chosen)
        rows.append(np.concatenate([ops.convert_to_numpy(g).ravel() for g in gradients]))
    given = None if variables is None else model.get_layer(variables)
    check(gradient_noise_scale(model, loss, (x, y), given), np.stack(rows).astype("float64"), rel=1e-3)


def test_it_predicts_the_variance_of_the_gradient_of_batches():
    n = 4000
    draw = np.random.default_rng(0)
    x = draw.normal(size=(n, D)).astype("float32")
    y = (x.sum(axis=1, keepdims=True) + draw.normal(size=(n, 1))).astype("float32")
    found = gradient_noise_scale(linear(), "mse", (x, y))
    model, size = linear(), 50
    operator = [kg.curvature.Hessian(model, "mse", (x[i : i + size], y[i : i + size])) for i in range(0, n, size)]
    gradients = np.stack([o.gradient() for o in operator]).astype("float64")
    variance = gradients.var(axis=0, ddof=1).sum()
    # 80 batches: the variance of four numbers is known to about 10%.
    assert variance == pytest.approx(found.covariance_trace / size, rel=0.3)


def test_no_gradient_above_the_noise():
    x = np.ones((2, 1), "float32")
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1, use_bias=False)])
    model.set_weights([np.zeros((1, 1))])
    found = gradient_noise_scale(model, "mse", (x, np.array([[1.0], [-1.0]], "float32")))
    assert found.noise_scale == np.inf and found.squared_norm < 0
    same = gradient_noise_scale(model, "mse", (x, x))
    assert same.noise_scale == 0 and same.squared_norm == 4


def test_nothing_is_traced_again():
    calls = []

    class Counted(layers.Layer):
        def call(self, x):
            calls.append(1)
            return x

    model = keras.Sequential([keras.Input((D,)), Counted(), layers.Dense(1)])
    model.compile("sgd", "mse")
    compiled_by(lambda: gradient_noise_scale(model, None, (X, Y)))
    before = len(calls)
    model.set_weights([2 * w for w in model.get_weights()])
    gradient_noise_scale(model, None, (X, Y))
    # Whether an example stands alone is looked at in two calls that are not traced.
    assert len(calls) == before + 2


def test_nothing_changes_in_training_mode():
    model = keras.Sequential([keras.Input((D,)), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(1)])
    before = [ops.convert_to_numpy(v).copy() for v in model.variables]
    first = gradient_noise_scale(model, "mse", (X, Y), training=True)
    assert gradient_noise_scale(model, "mse", (X, Y), training=True) == first
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": (X[:1], Y[:1])}, "two examples or more. Received: 1"),
        ({"loss": None}, "expects a loss, or a compiled model"),
        ({"chunk_size": 0}, "as `chunk_size`. Received: chunk_size=0"),
        ({"chunk_size": 1.5}, "as `chunk_size`. Received: chunk_size=1.5"),
        ({"batch_size": 0}, "as `batch_size`"),
        ({"training": 1}, "True or False as `training`"),
        ({"model": lambda x: x}, "expects a keras.Model"),
    ],
    ids=["one example", "no loss", "zero", "part", "batch", "mode", "function"],
)
def test_refused(options, message):
    given = {"model": linear(), "data": (X, Y), "loss": "mse", **options}
    with pytest.raises(ValueError, match=f"gradient_noise_scale .*{message}"):
        gradient_noise_scale(**given)


def test_infinity_is_no_number():
    x = X.copy()
    x[2, 1] = np.inf
    assert np.isnan(gradient_noise_scale(linear(), "mse", (x, Y)).noise_scale)
