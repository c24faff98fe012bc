"""Random estimates of Laplacians and divergences: where they are exact, their mean, their error, and training."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.transforms.taylor import operators
from keras_gradtools.transforms.taylor.sampling import Sampling
from tests.transforms import point_functions

RNG = np.random.default_rng(0)
N = 6
X = RNG.normal(size=(4, N)).astype("float32")
SQUARE = RNG.normal(size=(N, N)).astype("float32")
SYMMETRIC = SQUARE + SQUARE.T
MATRIX = RNG.normal(size=(N, N)).astype("float32")
DIAGONAL = RNG.normal(size=N).astype("float32")
DIRECTIONS = ["rademacher", "gaussian", "coordinates"]


def numbers(x):
    return ops.convert_to_numpy(ops.stop_gradient(ops.convert_to_tensor(x))).astype("float64")


def close(found, expected, rtol=1e-4, atol=1e-5):
    np.testing.assert_allclose(numbers(found), numbers(expected), rtol=rtol, atol=atol)


def quadratic(x):
    """x^T A x / 2, with the Hessian A, and three times as much."""
    value = ops.sum(ops.matmul(x, SYMMETRIC) * x, axis=1, keepdims=True) / 2
    return ops.concatenate([value, 3 * value], axis=1)


def separable(x):
    """Without mixed derivatives. Its second derivatives are -sin(x_i) and 6 x_i."""
    return ops.stack([ops.sum(ops.sin(x), axis=1), ops.sum(x**3, axis=1)], axis=1)


def linear(x):
    return ops.matmul(x, SQUARE)


network = point_functions.network("tanh", columns=N)
FUNCTIONS = {
    "network": network,
    "quadratic": quadratic,
    "separable": separable,
    "layer normalization": point_functions.network("gelu", layers.LayerNormalization(), columns=N),
    "attention": point_functions.attention,
    "custom gradient": point_functions.custom,
    "broadcasting": lambda x: ops.sum(x, axis=1, keepdims=True) * x / (1 + ops.sum(x**2, axis=1, keepdims=True)),
    "a factor of lower rank": lambda x: ops.transpose(ops.sum(x**2, axis=1) * ops.sin(ops.transpose(x))),
    "scalars": lambda x: ops.sqrt(1 + ops.sum(x**2, axis=1)),
    "higher rank": lambda x: ops.einsum("bi,bj->bij", x, ops.sin(x)),
    "linear": linear,
    "constant": lambda x: ops.ones((4, 2)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("coefficients", [None, DIAGONAL, MATRIX], ids=["none", "diagonal", "matrix"])
def test_all_coordinates_are_exact(name, coefficients):
    fun = FUNCTIONS[name]
    exact = kg.laplacian(fun, coefficients=coefficients)(X)
    options = {"coefficients": coefficients, "samples": N, "directions": "coordinates"}
    close(kg.laplacian(fun, seed=0, **options)(X), exact)
    found, error = kg.laplacian(fun, seed=0, return_standard_error=True, **options)(X)
    close(found, exact)
    np.testing.assert_array_equal(numbers(error), np.zeros(exact.shape))


def test_random_signs_are_exact_without_mixed_derivatives():
    expected = np.stack([-np.sin(X).sum(axis=1), 6 * X.sum(axis=1)], axis=1)
    close(kg.laplacian(separable, samples=1, seed=0)(X), expected)
    found, error = kg.laplacian(separable, samples=3, seed=0, return_standard_error=True)(X)
    close(found, expected)
    close(error, np.zeros_like(expected), atol=1e-5)


@pytest.mark.parametrize("axes", [None, [4, 0, -1]])
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_the_samples_are_those_of_the_directions(directions, axes):
    """The mean and the standard error of v^T D A v, with the directions that the seed gives."""
    chosen = list(range(N)) if axes is None else [i % N for i in axes]
    hessian = SYMMETRIC[np.ix_(chosen, chosen)].astype("float64")
    count, samples = len(chosen), 3
    options = {"axes": axes, "samples": samples, "directions": directions, "seed": 5, "return_standard_error": True}
    # Of f = x_i x_j, the sample is 2 v_i v_j for i != j, and 2 v_i^2 for f = x_i^2. These are the directions.
    outer = [numbers(v) for v in _directions(options, chosen)]
    for given, d in (
        (None, np.eye(count)),
        (DIAGONAL[:count], np.diag(DIAGONAL[:count])),
        (MATRIX[:count, :count],) * 2,
    ):
        values = np.array([v @ d @ hessian @ v for v in outer])
        found, error = kg.laplacian(quadratic, coefficients=given, **options)(X)
        close(found, np.full((4, 1), values.mean()) * [1, 3], rtol=1e-4, atol=1e-4)
        variance = values.var(ddof=1) / samples * (1 - samples / count if directions == "coordinates" else 1)
        close(error, np.full((4, 1), variance**0.5) * [1, 3], rtol=1e-3, atol=1e-3)


def _directions(options, chosen):
    sampling = Sampling(options["samples"], options["directions"], True)
    return sampling.draw("laplacian", len(chosen), options["seed"], "float32")


@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize("operator", ["laplacian", "divergence"])
def test_the_mean_over_seeds_is_within_its_error(operator, directions):
    make, fun = (kg.laplacian, network) if operator == "laplacian" else (kg.divergence, lambda x: ops.tanh(linear(x)))
    exact = numbers(make(fun)(X))
    generator = keras.random.SeedGenerator(0)
    estimate = make(fun, samples=4, directions=directions, seed=generator, return_standard_error=True)
    found = [tuple(map(numbers, estimate(X))) for _ in range(200)]
    means, errors = (np.array(column) for column in zip(*found, strict=True))
    # The squared errors are unbiased estimates of the variance.
    expected = np.sqrt((errors**2).mean(axis=0))
    np.testing.assert_allclose(means.std(axis=0), expected, rtol=0.25)
    assert np.all(np.abs(means.mean(axis=0) - exact) < 4 * expected / 200**0.5 + 1e-5)


@pytest.mark.parametrize("name", ["network", "attention", "higher rank", "broadcasting", "custom gradient"])
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_the_estimate_is_the_same_with_its_error_and_in_chunks(name, directions):
    fun, options = FUNCTIONS[name], {"samples": 5, "directions": directions, "seed": 3}
    expected = kg.laplacian(fun, **options)(X)
    found, error = kg.laplacian(fun, return_standard_error=True, **options)(X)
    assert tuple(found.shape) == tuple(error.shape) == tuple(expected.shape)
    close(found, expected)
    close(kg.laplacian(fun, chunk_size=2, **options)(X), expected)
    for chunked in kg.laplacian(fun, chunk_size=2, return_standard_error=True, **options)(X), (found, error):
        close(chunked[0], expected)
        close(chunked[1], error, rtol=1e-3)


@pytest.mark.parametrize("name", ["network", "higher rank", "scalars"])
@pytest.mark.parametrize("coefficients", [None, DIAGONAL, MATRIX], ids=["none", "diagonal", "matrix"])
def test_functions_that_cannot_be_taken_apart(name, coefficients, monkeypatch):
    """Nested derivatives along the same directions, and one direction after the other."""
    options = {"coefficients": coefficients, "samples": 3, "seed": 3, "return_standard_error": True}
    field = {"samples": 3, "seed": 3, "return_standard_error": True}
    expected = kg.laplacian(FUNCTIONS[name], **options)(X), kg.divergence(linear, **field)(X)
    monkeypatch.setattr(operators, "_taken_apart", lambda call, operations: None)
    fresh = lambda fun: lambda x: fun(x)  # noqa: E731 - without a cached program
    close(kg.laplacian(fresh(FUNCTIONS[name]), **options)(X), expected[0], rtol=1e-3, atol=1e-4)
    close(kg.divergence(fresh(linear), **field)(X), expected[1], rtol=1e-3)
    monkeypatch.setattr(operators, "_nested_laplacian", operators._laplacian_by_directions)
    close(kg.laplacian(fresh(FUNCTIONS[name]), **options)(X), expected[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("directions", DIRECTIONS)
def test_divergences(directions):
    """The samples of the divergence of A x are v^T A v. In chunks they are the same."""
    options = {"samples": 4, "directions": directions, "seed": 2}
    vectors = numbers(_directions(options, range(N)))
    values = np.einsum("si,ji,sj->s", vectors, SQUARE.T.astype("float64"), vectors)
    close(kg.divergence(linear, **options)(X), np.full((4, 1), values.mean()), rtol=1e-4, atol=1e-4)
    factor = 1 - 4 / N if directions == "coordinates" else 1
    for chunk_size in (None, 3):
        _, error = kg.divergence(linear, chunk_size=chunk_size, return_standard_error=True, **options)(X)
        close(error, np.full((4, 1), (values.var(ddof=1) / 4 * factor) ** 0.5), rtol=1e-3)
    close(kg.divergence(lambda x: ops.ones_like(x), **options)(X), np.zeros((4, 1)))


def test_an_integer_draws_the_same_and_a_generator_new_directions():
    once, again = (kg.laplacian(network, samples=2, seed=7) for _ in range(2))
    np.testing.assert_array_equal(numbers(once(X)), numbers(again(X)))
    np.testing.assert_array_equal(numbers(once(X)), numbers(once(X)))
    assert not np.allclose(numbers(kg.laplacian(network, samples=2, seed=8)(X)), numbers(once(X)))
    first, second = (kg.laplacian(network, samples=2, seed=keras.random.SeedGenerator(1)) for _ in range(2))
    found = [numbers(first(X)) for _ in range(3)]
    assert not np.allclose(found[0], found[1]) and not np.allclose(found[1], found[2])
    for expected in found:
        np.testing.assert_array_equal(numbers(second(X)), expected)


def test_the_global_seed():
    keras.utils.set_random_seed(3)
    first = numbers(kg.laplacian(network, samples=2)(X))
    assert not np.allclose(numbers(kg.laplacian(network, samples=2)(X)), first)
    keras.utils.set_random_seed(3)
    np.testing.assert_array_equal(numbers(kg.laplacian(network, samples=2)(X)), first)


@pytest.mark.parametrize("directions", DIRECTIONS)
def test_a_compiled_function_advances_the_generator(directions):
    eager, compiled = (
        kg.laplacian(network, samples=2, directions=directions, seed=keras.random.SeedGenerator(1)) for _ in range(2)
    )
    program = kg.jit(lambda x: compiled(x))
    for _ in range(3):
        close(program(X), eager(X))


def test_other_transforms_do_not_advance_the_generator():
    generator = keras.random.SeedGenerator(1)
    state = numbers(generator.state)
    kg.grad(lambda x: ops.sum(kg.laplacian(network, samples=2, seed=generator)(x)))(ops.convert_to_tensor(X))
    np.testing.assert_array_equal(numbers(generator.state), state)
    with kg.GradientTape():
        kg.laplacian(network, samples=2, seed=generator)(X)
    assert not np.array_equal(numbers(generator.state), state)


@pytest.mark.parametrize("return_standard_error", [False, True])
def test_the_gradient_by_the_weights_is_that_of_the_same_directions(return_standard_error):
    """By finite differences. The sum of all samples is a function of the weights, because the seed is fixed."""
    estimate = kg.laplacian(network, samples=3, seed=1, return_standard_error=return_standard_error)
    kernel = network.trainable_variables[0]
    point = ops.convert_to_tensor(X)

    def loss():
        found = estimate(point)
        return ops.sum(found[0] ** 2 - found[1] ** 2) if return_standard_error else ops.sum(found**2)

    with kg.GradientTape() as tape:
        value = loss()
    gradient = numbers(tape.gradient(value, kernel))
    start, direction, step = numbers(kernel), RNG.normal(size=kernel.shape), 1e-2

    def at(offset):
        kernel.assign(start + offset * direction)
        return float(numbers(loss()))

    slope = (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)
    kernel.assign(start)
    np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=2e-2)


def test_a_standard_error_of_zero_has_a_gradient():
    a = ops.convert_to_tensor(2.0)
    estimate = lambda a: kg.laplacian(  # noqa: E731
        lambda x: a * ops.sum(x**2, axis=1), samples=3, seed=0, return_standard_error=True
    )(ops.convert_to_tensor(X))
    gradient = kg.grad(lambda a: ops.sum(estimate(a)[0] ** 2 - estimate(a)[1] ** 2))(a)
    close(gradient, 4 * 2 * (2 * N) ** 2 * 2.0)  # the derivative of 4 (2 N a)^2


def test_the_square_without_its_bias():
    """The mean of estimate^2 - error^2 is the square of the Laplacian, and that of estimate^2 is larger."""
    exact = numbers(kg.laplacian(quadratic)(X))[0, 0]
    estimate = kg.laplacian(quadratic, samples=2, seed=keras.random.SeedGenerator(0), return_standard_error=True)
    found = np.array([[float(numbers(v)[0, 0]) for v in estimate(X[:1])] for _ in range(400)])
    squares, variances = found[:, 0] ** 2, found[:, 1] ** 2
    unbiased = squares - variances
    assert abs(unbiased.mean() - exact**2) < 4 * unbiased.std() / 20
    assert variances.mean() > 8 * unbiased.std() / 20


def test_many_axes():
    """The Laplacian of the norm is (n - 1) / r."""
    n = 20_000
    x = RNG.normal(size=(2, n)).astype("float32")
    norm = lambda x: ops.sqrt(ops.sum(x**2, axis=1))  # noqa: E731
    expected = (n - 1) / np.linalg.norm(x.astype("float64"), axis=1)
    for directions in ("rademacher", "coordinates"):
        found, error = kg.laplacian(norm, samples=8, directions=directions, seed=0, return_standard_error=True)(x)
        assert np.all(np.abs(numbers(found) - expected) < 5 * numbers(error) + 1e-3 * expected)
    others = kg.laplacian(norm, axes=range(1, n), samples=8, seed=0)(x)
    close(others, kg.laplacian(norm, samples=8, seed=0)(x), rtol=0.1)


LAYERS = {"Laplacian": (kg.layers.Laplacian, 2), "Divergence": (kg.layers.Divergence, N)}


def trained(outputs):
    model = keras.Sequential([keras.Input((N,)), layers.Dense(8, "tanh"), layers.Dense(outputs)])
    rng = np.random.default_rng(1)
    for v in model.trainable_variables:
        v.assign(0.5 * rng.normal(size=v.shape))
    return model


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, tmp_path):
    make, outputs = LAYERS[name]
    model, x = trained(outputs), keras.Input((N,))
    options = {"samples": N, "directions": "coordinates", "seed": 4, "return_standard_error": True}
    layer = make(model, return_outputs=True, **options)
    value, found, error = layer(X)
    close(value, model(X))
    close(found, make(model)(X))
    close(error, np.zeros(found.shape))
    trainer = keras.Model(x, layer(x))
    assert [tuple(y.shape) for y in trainer.outputs] == [(None, *y.shape[1:]) for y in (value, found, error)]
    trainer.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert all(loaded.layers[-1].get_config()[key] == given for key, given in options.items())
    for y, expected in zip(loaded.predict(X, verbose=0), (value, found, error), strict=True):
        close(y, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_each_call_of_a_layer_draws_new_directions(name):
    make, outputs = LAYERS[name]
    model = trained(outputs)
    first, second = (make(model, samples=2, seed=1) for _ in range(2))
    found = [numbers(first(X)) for _ in range(3)]
    assert not np.allclose(found[0], found[1])
    for expected in found:
        np.testing.assert_array_equal(numbers(second(X)), expected)


class Seen(keras.layers.Layer):
    """Adds up what it sees, and the squares."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.total = self.add_weight(shape=(2,), initializer="zeros", trainable=False)

    def call(self, x):
        mean = ops.mean(x)
        self.total.assign(self.total + ops.stack([mean, mean**2]))
        return x


def test_fit_draws_new_directions_at_every_step():
    """With a learning rate of 0, what varies from step to step are the directions."""
    model, x = trained(2), keras.Input((N,))
    seen = Seen()
    trainer = keras.Model(x, seen(kg.layers.Laplacian(model, samples=2, seed=1)(x)))
    trainer.compile(keras.optimizers.SGD(0.0), "mse")
    trainer.fit(X, np.zeros((4, 2), "float32"), batch_size=4, epochs=6, verbose=0)
    by_hand = kg.layers.Laplacian(model, samples=2, seed=1)
    expected = [numbers(by_hand(X)).mean() for _ in range(6)]
    total, squares = numbers(seen.total)
    np.testing.assert_allclose(total, sum(expected), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(squares, sum(v**2 for v in expected), rtol=1e-3)


def test_fit_lowers_the_exact_laplacian():
    model, x = trained(2), keras.Input((N,))
    before = float(np.mean(numbers(kg.laplacian(model)(X)) ** 2))
    trainer = keras.Model(x, kg.layers.Laplacian(model, samples=4, seed=1)(x))
    trainer.compile(keras.optimizers.Adam(0.02), "mse")
    trainer.fit(X, np.zeros((4, 2), "float32"), epochs=40, verbose=0)
    assert np.mean(numbers(kg.laplacian(model)(X)) ** 2) < 0.2 * before


BAD = [
    (lambda: kg.laplacian(ops.sin, samples=0), "a positive integer, or None, as `samples`"),
    (lambda: kg.laplacian(ops.sin, samples=2.0), "a positive integer, or None, as `samples`"),
    (lambda: kg.laplacian(ops.sin, samples=2, directions="normal"), "rademacher"),
    (lambda: kg.laplacian(ops.sin, samples=2, seed=-1), "seed"),
    (lambda: kg.laplacian(ops.sin, samples=2, seed="now"), "seed"),
    (lambda: kg.laplacian(ops.sin, samples=2, return_standard_error=1), "True or False"),
    (lambda: kg.laplacian(ops.sin, samples=1, return_standard_error=True), "at least 2 `samples`"),
    (lambda: kg.laplacian(ops.sin, seed=0), "expects `samples`.* with `seed`. Received: seed=0"),
    (lambda: kg.laplacian(ops.sin, directions="gaussian"), "with `directions`"),
    (lambda: kg.divergence(ops.sin, return_standard_error=True), "divergence expects `samples`"),
    (lambda: kg.laplacian(ops.sin, samples=N + 1, directions="coordinates")(X), f"at most {N} `samples`"),
    (lambda: kg.laplacian(ops.sin, axes=[0], samples=2, directions="coordinates")(X), "at most 1 `samples`"),
    (lambda: kg.layers.Laplacian(network, samples=0), "Laplacian expects a positive integer"),
    (lambda: kg.layers.Laplacian(network, seed=1), "Laplacian expects `samples`"),
    (lambda: kg.layers.Divergence(network, samples=2, seed=keras.random.SeedGenerator(1)), "Divergence.*integer"),
]


@pytest.mark.parametrize("call, message", BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
