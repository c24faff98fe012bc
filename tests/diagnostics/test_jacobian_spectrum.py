"""`jacobian_spectrum`: against NumPy's singular values of the explicit Jacobian."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.diagnostics import jacobian_spectrum

RNG = np.random.default_rng(12)


def filled(model, seed=0):
    draw = np.random.default_rng(seed)
    model.set_weights([draw.normal(size=w.shape) / max(np.sqrt(w.size) / 2, 1) for w in model.get_weights()])
    return model


def dense(n=6, m=4):
    return filled(keras.Sequential([keras.Input((n,)), layers.Dense(10, "tanh"), layers.Dense(m)]))


def convolutional():
    parts = [layers.Conv2D(4, 3, activation="softplus", padding="same"), layers.Conv2D(2, 3, padding="same")]
    return filled(keras.Sequential([keras.Input((9, 9, 2)), *parts]))


def several_inputs_and_outputs():
    a, b = keras.Input((3,)), keras.Input((2, 2))
    both = layers.Concatenate()([a, layers.Flatten()(b)])
    hidden = layers.Dense(5, "tanh")(both)
    return filled(keras.Model([a, b], [layers.Dense(2)(hidden), layers.Dense(3)(both)]))


def examples_of(model, count=5):
    shapes = [tuple(x.shape[1:]) for x in model.inputs]
    arrays = [RNG.normal(size=(count, *shape)).astype("float32") for shape in shapes]
    return arrays if len(arrays) > 1 else arrays[0]


def explicit_values(model, x):
    """Singular values by NumPy, of Jacobians put together row by row."""
    inputs = [ops.convert_to_tensor(a) for a in x] if isinstance(x, list) else ops.convert_to_tensor(x)
    found = kg.batch_jacobian(model)(inputs)
    rows = found if isinstance(found, list) and isinstance(x, list) else [[found]]
    count = len(x[0]) if isinstance(x, list) else len(x)
    outputs = [tuple(y.shape[1:]) for y in model.outputs]
    blocks = [
        np.concatenate([ops.convert_to_numpy(j).reshape(count, int(np.prod(shape)), -1) for j in row], axis=2)
        for row, shape in zip(rows, outputs, strict=True)
    ]
    return np.linalg.svd(np.concatenate(blocks, axis=1).astype("float64"), compute_uv=False)


MODELS = pytest.mark.parametrize("build", [dense, convolutional, several_inputs_and_outputs])


@MODELS
def test_explicit_values_are_numpys(build):
    model = build()
    x = examples_of(model)
    expected = explicit_values(model, x)
    found = jacobian_spectrum(model, x, method="explicit")
    np.testing.assert_allclose(found.singular_values, expected, atol=1e-5 * expected.max())
    np.testing.assert_allclose(found.spectral_norm, expected[:, 0], rtol=1e-4)
    np.testing.assert_allclose(found.frobenius_norm, np.linalg.norm(expected, axis=1), rtol=1e-4)


@MODELS
def test_implicit_norms_in_thirty_iterations(build):
    model = build()
    x = examples_of(model)
    expected = explicit_values(model, x)
    found = jacobian_spectrum(model, x, method="implicit")
    np.testing.assert_allclose(found.spectral_norm, expected[:, 0], rtol=1e-2)
    frobenius = np.linalg.norm(expected, axis=1)
    # Exact where there are no more directions than iterations; else an estimate.
    np.testing.assert_allclose(found.frobenius_norm, frobenius, rtol=1e-3 if expected.shape[1] <= 30 else 0.2)
    assert found.singular_values is None and found.condition_number is None and found.effective_rank is None
    assert found.dynamical_isometry is None


def test_implicit_norm_of_a_spectrum_without_a_gap():
    # Singular values 1, 0.99, 0.98, ...: what power iteration takes hundreds of products for.
    n = 200
    left, _ = np.linalg.qr(RNG.normal(size=(n, n)))
    right, _ = np.linalg.qr(RNG.normal(size=(n, n)))
    model = keras.Sequential([keras.Input((n,)), layers.Dense(n, use_bias=False)])
    model.set_weights([left * np.linspace(1.0, 0.01, n) @ right])
    found = jacobian_spectrum(model, RNG.normal(size=(3, n)).astype("float32"), method="implicit")
    np.testing.assert_allclose(found.spectral_norm, 1.0, rtol=1e-2)


def test_auto_forms_what_is_small():
    assert jacobian_spectrum(dense(), examples_of(dense())).singular_values is not None
    assert jacobian_spectrum(convolutional(), examples_of(convolutional())).singular_values is None


def test_quantities_in_closed_form():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, use_bias=False)])
    model.set_weights([np.array([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])])
    found = jacobian_spectrum(model, np.ones((2, 3), "float32"))
    np.testing.assert_allclose(found.singular_values, [[4.0, 3.0]] * 2, rtol=1e-6)
    np.testing.assert_allclose(found.frobenius_norm, 5.0, rtol=1e-6)
    np.testing.assert_allclose(found.condition_number, 4 / 3, rtol=1e-6)
    p = np.array([3, 4]) / 7
    np.testing.assert_allclose(found.effective_rank, np.exp(-(p * np.log(p)).sum()), rtol=1e-6)
    np.testing.assert_allclose(found.dynamical_isometry, np.sqrt((3**2 + 2**2) / 2), rtol=1e-6)


def test_a_singular_and_a_zero_jacobian():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2, use_bias=False)])
    model.set_weights([np.array([[1.0, 1.0], [1.0, 1.0]])])
    assert np.isinf(jacobian_spectrum(model, np.ones((1, 2), "float32")).condition_number).all()
    model.set_weights([np.zeros((2, 2))])
    for method in ("explicit", "implicit"):
        found = jacobian_spectrum(model, np.ones((1, 2), "float32"), method=method)
        assert found.spectral_norm == 0 and found.frobenius_norm == 0
    assert jacobian_spectrum(model, np.ones((1, 2), "float32")).effective_rank == 0


def test_nothing_changes():
    model = keras.Sequential([keras.Input((4,)), layers.Dropout(0.5, seed=1), layers.BatchNormalization()])
    before = [np.copy(w) for w in model.get_weights()]
    seeds = [np.copy(ops.convert_to_numpy(v.value)) for v in model.non_trainable_variables]
    for method in ("explicit", "implicit"):
        jacobian_spectrum(model, RNG.normal(size=(3, 4)).astype("float32"), training=True, method=method)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    for old, v in zip(seeds, model.non_trainable_variables, strict=True):
        np.testing.assert_array_equal(old, ops.convert_to_numpy(v.value))


@pytest.mark.parametrize(
    ("x", "options", "match"),
    [
        (np.ones((2, 6), "float32"), {"method": "svd"}, "as `method`"),
        (np.ones((2, 6), "float32"), {"iterations": 0}, "as `iterations`"),
        (np.ones((2, 6), "float32"), {"seed": None}, "as `seed`"),
        (np.ones((2, 6), "int32"), {}, "floating-point inputs"),
        (np.float32(1.0), {}, "floating-point examples"),
        (np.full((2, 6), np.nan, "float32"), {}, "2 of 2 examples"),
    ],
)
def test_what_does_not_fit(x, options, match):
    with pytest.raises(ValueError, match=match):
        jacobian_spectrum(dense(), x, **options)
