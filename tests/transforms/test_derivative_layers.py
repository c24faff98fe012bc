"""BatchJacobian, Laplacian and Divergence as layers and as transforms, against closed forms and Hessians."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg

RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 3)).astype("float32")


def network(outputs=1, *, width=8):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(width, "tanh"), layers.Dense(outputs)])
    rng = np.random.default_rng(1)
    for v in model.trainable_variables:
        v.assign(rng.normal(size=v.shape))
    return model


def numbers(x):
    return ops.convert_to_numpy(ops.stop_gradient(x)).astype("float64")


def by_hessian(model, axes):
    """The Laplacian of each output, by the Hessian of each example."""
    found = []
    for x in X:
        blocks = numbers(kg.jacobian(lambda x: kg.jacobian(lambda z: model(z[None])[0])(x))(ops.convert_to_tensor(x)))
        found.append(sum(blocks[:, i, i] for i in axes))
    return np.array(found)


@pytest.mark.parametrize(
    ("axes", "outputs"),
    [
        (None, 1),
        ([2, 0], 2),
        *[pytest.param(axes, 3 - n, marks=pytest.mark.fast_on("torch")) for axes, n in ((None, 1), ([2, 0], 2))],
        *[pytest.param(axes, n, marks=pytest.mark.fast_on("torch")) for axes in ([0], [-1]) for n in (1, 2)],
    ],
)
def test_laplacian_is_the_trace_of_the_hessian(outputs, axes):
    model = network(outputs)
    expected = by_hessian(model, [0, 1, 2] if axes is None else [i % 3 for i in axes])
    np.testing.assert_allclose(numbers(kg.laplacian(model, axes)(X)), expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(numbers(kg.layers.Laplacian(model, axes)(X)), expected, rtol=1e-3, atol=1e-4)


def test_laplacian_of_no_example_and_of_no_output():
    assert numbers(kg.laplacian(lambda x: x**3)(X[:0])).shape == (0, 3)
    assert numbers(kg.laplacian(lambda x: x[:, :0] ** 3)(X)).shape == (5, 0)


def test_laplacian_of_a_harmonic_and_of_a_linear_function():
    harmonic = kg.laplacian(lambda x: ops.exp(x[:, :1]) * ops.sin(x[:, 1:2]))
    np.testing.assert_allclose(numbers(harmonic(X)), 0.0, atol=1e-5)
    np.testing.assert_array_equal(numbers(kg.laplacian(lambda x: 2 * x)(X)), np.zeros((5, 3)))
    scalars = kg.laplacian(lambda x: ops.sum(x**2, axis=1))
    np.testing.assert_allclose(numbers(scalars(X)), 6.0 * np.ones(5), rtol=1e-6)


@pytest.mark.parametrize("axes", [None, [2, 0, 1]])
def test_divergence_is_the_trace_of_the_jacobian(axes):
    model = network(3)
    jacobian = numbers(kg.batch_jacobian(model)(X))
    expected = sum(jacobian[:, k, i] for k, i in enumerate(axes or [0, 1, 2]))[:, None]
    np.testing.assert_allclose(numbers(kg.divergence(model, axes)(X)), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(numbers(kg.layers.Divergence(model, axes)(X)), expected, rtol=1e-4, atol=1e-5)


def test_batch_jacobian_as_a_layer():
    model = network(2)
    found = kg.layers.BatchJacobian(model)(X)
    assert tuple(found.shape) == (5, 2, 3)
    np.testing.assert_allclose(numbers(found), numbers(kg.batch_jacobian(model)(X)), rtol=1e-5, atol=1e-6)


MATRIX = [[1.0, 2.0], [-0.5, 3.0]]


@pytest.mark.parametrize("coefficients", [[2.0, -1.0], MATRIX, np.array(MATRIX, "float32"), np.array([[1, 2], [3, 4]])])
def test_laplacian_with_coefficients(coefficients, tmp_path):
    """Of x^T A x / 2 with a symmetric A, the second derivatives are A."""
    a = np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]], "float32")
    inputs, turn, half = keras.Input((3,)), layers.Dense(3, use_bias=False), layers.Dense(1, use_bias=False)
    turned = turn(inputs)
    square = keras.Model(inputs, half(layers.Multiply()([turned, turned])))
    values, vectors = np.linalg.eigh(a)
    turn.set_weights([vectors])
    half.set_weights([values[:, None] / 2])
    d = np.diag(coefficients) if np.ndim(coefficients) == 1 else np.array(coefficients)
    expected = np.full((5, 1), (d * a[np.ix_([2, 0], [2, 0])]).sum())
    layer = kg.layers.Laplacian(square, axes=[2, 0], coefficients=coefficients)
    np.testing.assert_allclose(numbers(layer(X)), expected, rtol=1e-5)
    x = keras.Input((3,))
    keras.Model(x, layer(x)).save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.layers[-1].coefficients == np.array(coefficients).tolist()
    np.testing.assert_allclose(loaded.predict(X, verbose=0), expected, rtol=1e-5)


def test_coefficients_of_all_axes():
    model, matrix = network(2), np.random.default_rng(1).normal(size=(3, 3))
    found = kg.layers.Laplacian(model, coefficients=matrix)(X)
    expected = kg.laplacian(model, coefficients=matrix.astype("float32"))(X)
    np.testing.assert_allclose(numbers(found), numbers(expected), rtol=1e-5, atol=1e-6)


LAYERS = {
    "BatchJacobian": (lambda model, **options: kg.layers.BatchJacobian(model, **options), (3, 3)),
    "Laplacian": (lambda model, **options: kg.layers.Laplacian(model, axes=[0, 1], **options), (3,)),
    "Divergence": (lambda model, **options: kg.layers.Divergence(model, axes=[1, 2, 0], **options), (1,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_loss_on_it_trains_the_model(name, tmp_path):
    make, shape = LAYERS[name]
    model, x = network(3), keras.Input((3,))
    trainer = keras.Model(x, make(model)(x))
    assert trainer.output_shape == (None, *shape)
    assert {id(v) for v in trainer.trainable_variables} == {id(v) for v in model.trainable_variables}
    trainer.compile(keras.optimizers.Adam(0.01), "mse")
    target = np.zeros((5, *shape), "float32")
    losses = trainer.fit(X, target, epochs=30, verbose=0).history["loss"]
    assert losses[-1] < 0.5 * losses[0]
    trainer.save(tmp_path / "trainer.keras")
    loaded = keras.saving.load_model(tmp_path / "trainer.keras")
    np.testing.assert_allclose(loaded.predict(X, verbose=0), trainer.predict(X, verbose=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_the_training_gradient_is_that_of_differences(name):
    make, _ = LAYERS[name]
    model = network(3, width=4)
    layer = make(model)
    kernel = model.trainable_variables[0]
    with kg.GradientTape() as tape:
        loss = ops.sum(layer(ops.convert_to_tensor(X)) ** 2)
    gradient = numbers(tape.gradient(loss, kernel))
    start, direction, step = numbers(kernel), RNG.normal(size=kernel.shape), 1e-2

    def at(offset):
        kernel.assign(start + offset * direction)
        return float(numbers(ops.sum(layer(X) ** 2)))

    slope = (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)
    np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=2e-2)


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_come_with_it(name):
    make, _ = LAYERS[name]
    model = network(3)
    outputs, derivative = make(model, return_outputs=True)(X)
    np.testing.assert_allclose(numbers(outputs), numbers(model(X)), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(numbers(derivative), numbers(make(model)(X)), rtol=1e-6, atol=1e-6)


def test_statistics_are_those_of_one_call():
    normalized = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(), layers.Dense(1)])
    other = keras.models.clone_model(normalized)
    kg.layers.Laplacian(normalized)(X, training=True)
    other(X, training=True)
    for v, w in zip(normalized.layers[0].variables, other.layers[0].variables, strict=True):
        np.testing.assert_allclose(numbers(v), numbers(w), rtol=1e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: kg.laplacian("net"), "laplacian takes a function"),
        (lambda: kg.laplacian(ops.sin)(np.ones(3, "float32")), r"input of shape \(batch, n\)"),
        (lambda: kg.laplacian(ops.sin)(np.ones((2, 0), "float32")), r"\(batch, n\), with n known and not 0"),
        (lambda: kg.laplacian(ops.sin, axes=[3])(X), "distinct axis indices"),
        (lambda: kg.laplacian(ops.sin, axes=[0, -3])(X), "distinct axis indices"),
        (lambda: kg.laplacian(lambda x: (x, x))(X), "laplacian expects one output"),
        (lambda: kg.divergence(ops.sin, axes=[0])(X), r"outputs of shape \(batch, 1\)"),
        (lambda: kg.layers.Laplacian("net"), "Laplacian expects a Keras layer or model"),
        (lambda: kg.layers.BatchJacobian(layers.Dense(2), return_outputs=1), "True or False as `return_outputs`"),
        (lambda: kg.layers.Laplacian(network(), axes=[5])(keras.Input((3,))), "distinct axis indices"),
        (lambda: kg.layers.Laplacian(network(), axes=[0], coefficients=[1.0, 2.0]), r"shape \(1,\) or \(1, 1\)"),
        (lambda: kg.layers.Laplacian(network(), coefficients=[1.0])(X), r"shape \(3,\) or \(3, 3\), for 3 axes"),
        (lambda: kg.layers.Laplacian(network(), coefficients=[1.0])(keras.Input((3,))), "for 3 axes. Received"),
        (lambda: kg.layers.Laplacian(network(), coefficients=[[1.0, 2.0]]), r"shape \(m,\) or \(m, m\)"),
        (lambda: kg.layers.Laplacian(network(), coefficients=[[1.0, 2.0], [3.0]]), "finite numbers"),
        (lambda: kg.layers.Laplacian(network(), coefficients=[np.nan] * 3), "finite numbers"),
        (lambda: kg.layers.Laplacian(network(), coefficients=2.0), "finite numbers"),
        (lambda: kg.layers.Laplacian(network(), coefficients=["1"]), "finite numbers"),
        (lambda: kg.layers.Laplacian(network(), coefficients=keras.Variable([1.0] * 3)), "call `kg.laplacian`"),
        (lambda: kg.layers.Divergence(network(2))(keras.Input((3,))), r"outputs of shape \(batch, 3\)"),
        (lambda: kg.layers.Laplacian(layers.Identity())(keras.Input((3, 2))), r"input of shape \(batch, n\)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
