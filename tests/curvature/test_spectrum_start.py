"""The first steps of Lanczos' method as one program, against the dense matrix."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.curvature import Hessian
from keras_gradtools.curvature.estimators.spectrum_ends import spectrum_ends
from keras_gradtools.curvature.estimators.spectrum_start import spectrum_start

RNG = np.random.default_rng(17)
N, STEPS, SAMPLES = 11, 4, 3
X = RNG.normal(size=(N, 6)).astype("float32")
IMAGES = RNG.normal(size=(N, 5, 5, 2)).astype("float32")
Y = RNG.integers(0, 3, N)
SAMPLE_WEIGHT = RNG.uniform(0.2, 2.0, N).astype("float32")


def leaky(x):
    """A gradient that is not that of its value, and that is no constant."""

    @kg.custom_gradient
    def fun(x):
        return ops.tanh(x), lambda upstream: upstream * ops.cos(x)

    return fun(x)


def sequential(*stack, size=(6,)):
    keras.utils.set_random_seed(3)
    return keras.Sequential([keras.Input(size), *stack])


MODELS = {
    "dense": (lambda: sequential(layers.Dense(5, "tanh"), layers.Dense(3)), X),
    "one variable": (lambda: sequential(layers.Dense(3, use_bias=False)), X),
    "regularized": (lambda: sequential(layers.Dense(4, "gelu", kernel_regularizer="l2"), layers.Dense(3)), X),
    "with a custom gradient": (lambda: sequential(layers.Dense(4, leaky), layers.Dense(3)), X),
    "convolutional": (
        lambda: sequential(
            layers.Conv2D(3, 3, padding="same", strides=2),
            layers.BatchNormalization(),
            layers.Activation("swish"),
            layers.Dropout(0.4, seed=1),
            layers.Flatten(),
            layers.Dense(3),
            size=(5, 5, 2),
        ),
        IMAGES,
    ),
    "recurrent": (lambda: sequential(layers.Reshape((3, 2)), layers.SimpleRNN(3), layers.Dense(3)), X),
    "gated": (lambda: sequential(layers.Reshape((3, 2)), layers.GRU(3), layers.Dense(3)), X),
}


def hessian_of(name, data=None, **options):
    make, x = MODELS[name]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return Hessian(make(), loss, data or (x, Y), verbose=0, **options)


def random_bits(n, samples=SAMPLES):
    return np.random.default_rng(5).integers(0, 2, (1 + samples, n), dtype="uint8")


def assert_is_start(begun, matrix, gradient, first, bits, share):
    """Compares it with what a matrix and a gradient make of the same vectors."""
    rows, diagonal, remainders, samples = (np.asarray(ops.convert_to_numpy(t), "float64") for t in begun[:4])
    size = np.abs(np.linalg.eigvals(matrix)).max()
    np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=1e-4)
    signs = 2.0 * bits - 1
    w = first + share * signs[0] / np.linalg.norm(signs[0])
    np.testing.assert_allclose(rows[0], w / np.linalg.norm(w), atol=1e-5)
    known = rows[:STEPS]
    np.testing.assert_allclose(diagonal, np.einsum("ij,jk,ik->i", known, matrix, known), atol=1e-5 * size)
    for j in range(STEPS):
        product = matrix @ rows[j]
        left = product - rows[: j + 1].T @ (rows[: j + 1] @ product)
        np.testing.assert_allclose(remainders[j] * rows[j + 1], left, atol=2e-5 * size)
    vectors = signs[1:] - signs[1:] @ known.T @ known
    np.testing.assert_allclose(samples, np.einsum("ij,jk,ik->i", vectors, matrix, vectors), atol=2e-4 * size)
    length = float(ops.convert_to_numpy(begun.gradient_norm))
    assert length == pytest.approx(np.linalg.norm(gradient), rel=1e-4)


MARKS = {
    # Compiling its loop takes TensorFlow a minute.
    "gated": pytest.mark.slow,
    "recurrent": pytest.mark.fast_on("torch"),
    "regularized": pytest.mark.fast_on("torch"),
    # In training it is another model, and the more difficult one.
    "convolutional": pytest.mark.fast_on("torch"),
}


# Of these only the convolutional one is another model in training.
@pytest.mark.parametrize(
    ("name", "training"),
    [
        *[pytest.param(name, False, marks=MARKS.get(name, ())) for name in MODELS],
        ("dense", True),
        ("convolutional", True),
    ],
)
def test_it_is_that_of_the_hessian(name, training):
    hessian = hessian_of(name, training=training)
    n = hessian.shape[0]
    first, bits = np.eye(n, dtype="float32")[0], random_bits(n)
    begun = hessian.spectrum_start(first, bits, 0.3, STEPS)
    # Of a custom gradient the derivative need not be symmetric, as `dense` is.
    matrix = (hessian @ np.eye(n, dtype="float32")).astype("float64")
    assert_is_start(begun, matrix, hessian.gradient(), first, bits, 0.3)


def test_sample_weights_and_some_variables():
    make, x = MODELS["dense"]
    model = make()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    chosen = [model.layers[1].bias, model.layers[0].kernel]
    hessian = Hessian(model, loss, (x, Y, SAMPLE_WEIGHT), chosen, verbose=0)
    n = hessian.shape[0]
    first, bits = np.zeros(n, "float32"), random_bits(n)
    begun = hessian.spectrum_start(first, bits, 0.3, STEPS)
    assert_is_start(begun, hessian.dense().astype("float64"), hessian.gradient(), first, bits, 0.3)


def test_without_samples():
    hessian = hessian_of("dense")
    begun = hessian.spectrum_start(np.zeros(hessian.shape[0], "float32"), random_bits(hessian.shape[0], 0), 0.3, STEPS)
    assert tuple(begun.samples.shape) == (0,)


def test_the_weights_of_the_moment():
    hessian = hessian_of("dense")
    bits = random_bits(hessian.shape[0])
    for scale in (1.0, 0.5):
        for v in hessian.variables:
            v.assign(scale * ops.convert_to_tensor(v))
        first = np.zeros(hessian.shape[0], "float32")
        begun = hessian.spectrum_start(first, bits, 0.3, STEPS)
        assert_is_start(begun, hessian.dense().astype("float64"), hessian.gradient(), first, bits, 0.3)


def test_where_it_is_of_use():
    assert hessian_of("dense").can_start_spectrum(4)
    assert not hessian_of("dense").can_start_spectrum(50)
    assert not hessian_of("dense", batch_size=4).can_start_spectrum(4)
    deep = sequential(*(layers.Dense(2) for _ in range(20)))
    assert not Hessian(deep, "mse", (X, np.zeros((N, 2))), verbose=0).can_start_spectrum(4)
    # Few variables, and many operations to trace for each product.
    long = Hessian(sequential(layers.Dense(2), *many_activations()), "mse", (X, np.zeros((N, 2))), verbose=0)
    assert not long.can_start_spectrum(4)


def many_activations():
    return [layers.Activation("softplus") for _ in range(20)]


def test_products_of_many_layers_by_the_program_that_is_there():
    hessian = Hessian(sequential(layers.Dense(2), *many_activations()), "mse", (X, np.zeros((N, 2))), verbose=0)
    values = np.linalg.eigvalsh(hessian.dense().astype("float64"))
    found, _ = hessian.eigsh(k=1)
    np.testing.assert_allclose(found[0], values[np.abs(values).argmax()], rtol=1e-3)
    v = np.ones(hessian.shape[0], "float32")
    np.testing.assert_allclose(hessian.linearized() @ v, hessian.dense() @ v, rtol=1e-3, atol=1e-5)


# --- what `spectrum_ends` makes of it ---


class Matrix:
    def __init__(self, matrix):
        self._matrix = ops.convert_to_tensor(matrix.astype("float32"))

    def product(self, v):
        return ops.matmul(self._matrix, v)

    def quadratic_form(self, v):
        return ops.sum(v * self.product(v))


SIZE = 60
SPECTRA = {
    "a few large ones": np.concatenate([[50.0, 20.0, 9.0], RNG.normal(size=SIZE - 3) * 0.1]),
    "indefinite": np.concatenate([[10.0, 6.0, -8.0], RNG.normal(size=SIZE - 3)]),
    "of rank 2": np.concatenate([[3.0, 2.0], np.zeros(SIZE - 2)]),
    "a multiple of the identity": np.full(SIZE, 2.5),
    "zero": np.zeros(SIZE),
    "without a gap": np.linspace(-1.0, 2.0, SIZE),
}


def matrix_of(values):
    basis, _ = np.linalg.qr(RNG.normal(size=(len(values), len(values))))
    return (basis * values) @ basis.T


def ends_of(matrix, **options):
    products = []

    def begin(first, bits, share, steps):
        first = ops.convert_to_tensor(first, dtype="float32")
        return spectrum_start(Matrix(matrix), first, first, ops.convert_to_tensor(bits), share, steps)

    def matvec(v):
        products.append(1)
        return (matrix @ v).astype("float32")

    found = spectrum_ends(matvec, SIZE, most=SIZE, dtype="float32", begin=begin, **options)
    return found, len(products)


@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-3])
def test_both_ends(values, tol):
    found, _ = ends_of(matrix_of(values), tol=tol, samples=20)
    size = np.abs(values).max()
    assert abs(found.largest - values.max()) <= 2 * tol * size + 1e-12
    assert abs(found.smallest - values.min()) <= 2 * tol * size + 1e-12
    assert abs(found.trace.value - values.sum()) <= 4 * found.trace.standard_error + 1e-4 * size


def test_no_more_products_where_the_first_steps_are_enough():
    matrix = matrix_of(SPECTRA["a few large ones"])
    first, _ = ends_of(matrix, tol=1e-2, samples=4)
    moved = matrix + 1e-3 * np.diag(RNG.normal(size=SIZE))
    again, products = ends_of(moved, tol=1e-2, samples=4, start=first.start)
    assert products == 0 and again.matvecs == 9
    assert again.largest == pytest.approx(np.linalg.eigvalsh(moved)[-1], rel=1e-2)


def test_the_trace_is_of_the_first_steps_and_what_they_leave():
    values = SPECTRA["a few large ones"]
    matrix = matrix_of(values)
    misses = 0
    for seed in range(30):
        found, _ = ends_of(matrix, tol=1e-2, samples=20, seed=seed)
        misses += abs(found.trace.value - values.sum()) > 2.1 * found.trace.standard_error
    assert misses <= 5


def test_a_start_that_is_not_finite():
    with pytest.raises(FloatingPointError, match="not finite"):
        ends_of(np.full((SIZE, SIZE), np.nan), tol=1e-2)
