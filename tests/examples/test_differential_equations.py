"""The examples of differential equations: the solutions solve the equations, and the networks find them."""

import pathlib
import runpy
import sys

import keras
import numpy as np
import pytest
from keras import ops
from matplotlib import pyplot

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "examples" / "differential_equations"
RNG = np.random.default_rng(0)


@pytest.fixture
def load(monkeypatch):
    """Runs the file of an example as Python runs a script: with its folder on the path."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield lambda name: runpy.run_path(str(FOLDER / f"{name}.py"))
    sys.modules.pop("training", None)


def difference(f, points, *axes, h=2e-3):
    """The derivative of `f` by the coordinates `axes`, one after the other, by fourth-order central differences."""
    if not axes:
        return f(points)
    step = np.zeros(points.shape[1])
    step[axes[0]] = h
    near = difference(f, points + step, *axes[1:], h=h) - difference(f, points - step, *axes[1:], h=h)
    far = difference(f, points + 2 * step, *axes[1:], h=h) - difference(f, points - 2 * step, *axes[1:], h=h)
    return (8 * near - far) / (12 * h)


# The residuals at the points p, from a function d of points and of the axes of a derivative.
def of_poisson(d, p):
    x, y = p.T[..., None]
    f = -5 * np.pi**2 * np.sin(np.pi * x) * np.sin(2 * np.pi * y)
    return d(p, 0, 0) + d(p, 1, 1) - f


def of_burgers(d, p):
    return d(p, 0) + d(p) * d(p, 1) - 0.02 * d(p, 1, 1)


def of_kdv(d, p):
    return d(p, 0) + 6 * d(p) * d(p, 1) + d(p, 1, 1, 1)


def of_plate(d, p):
    a, b = np.cos(2 * np.pi * p.T[..., None])
    load = 4 * np.pi**4 * (4 * a * b - a - b)
    return (d(p, 0, 0, 0, 0) + 2 * d(p, 0, 0, 1, 1) + d(p, 1, 1, 1, 1) - load) / (24 * np.pi**4)


def of_allen_cahn(d, p):
    return d(p, 0) - 0.001 * d(p, 1, 1) - 5 * (d(p) - d(p) ** 3)


# The low and the high corner of the points, and the residual of the equation by differences.
EQUATIONS = {
    "poisson": ([0, 0], [1, 1], of_poisson),
    "burgers": ([0.1, -0.9], [0.9, 0.9], of_burgers),
    "kdv": ([0.1, -6], [0.9, 6], of_kdv),
    "plate": ([0, 0], [1, 1], of_plate),
    "allen_cahn": ([0.1, -0.9], [0.9, 0.9], of_allen_cahn),
}
IN_CLOSED_FORM = ["poisson", "burgers", "kdv", "plate"]


@pytest.mark.parametrize("name", IN_CLOSED_FORM)
def test_the_solution_solves_the_equation(name, load):
    low, high, residual = EQUATIONS[name]
    solution = load(name)["solution"]

    def derivative(points, *axes):
        return difference(solution, points, *axes, h=1e-2 if len(axes) > 2 else 2e-3)

    np.testing.assert_allclose(residual(derivative, RNG.uniform(low, high, (50, 2))), 0.0, atol=2e-4)


def test_the_reference_of_allen_cahn_solves_the_equation(load):
    size = 501
    u = load("allen_cahn")["reference"](size=size, steps=4).reshape(size, size)
    t, x = 1 / (size - 1), 2 / (size - 1)
    u_t = (8 * (u[3:-1] - u[1:-3]) - (u[4:] - u[:-4])) / (12 * t)
    u_xx = (16 * (u[:, 3:-1] + u[:, 1:-3]) - 30 * u[:, 2:-2] - (u[:, 4:] + u[:, :-4])) / (12 * x**2)
    inside = u[2:-2, 2:-2]
    np.testing.assert_allclose(u_t[:, 2:-2], 0.001 * u_xx[2:-2] + 5 * (inside - inside**3), atol=5e-3)
    np.testing.assert_allclose(u[:, 0], u[:, -1], atol=1e-12)


def test_the_right_side_in_100_dimensions(load):
    example = load("poisson_100d")
    x = example["ball"](3, seed=5).astype("float64")
    laplacian = sum(difference(example["solution"], x, i, i, h=1e-2) for i in range(100))
    found = ops.convert_to_numpy(example["right_side"](ops.convert_to_tensor(x.astype("float32"))))
    np.testing.assert_allclose(found, laplacian, rtol=1e-3, atol=1e-2)


BOUNDARIES = {
    "poisson": [[0, 0.3], [1, 0.3], [0.3, 0], [0.3, 1]],
    "burgers": [[0, 0.3], [0, -0.8], [0.3, -1], [0.3, 1]],
    "kdv": [[0, -3.0], [0, 1.0], [0.3, -8], [0.3, 8]],
    "plate": [[0, 0.3], [1, 0.3], [0.3, 0], [0.3, 1]],
}


@pytest.mark.parametrize("name", BOUNDARIES)
def test_the_boundaries_are_right_whatever_the_network_is(name, load):
    example, points = load(name), np.array(BOUNDARIES[name], "float32")
    u, residual = example["build"]()
    np.testing.assert_allclose(u.predict_on_batch(points), example["solution"](points), atol=1e-4)
    assert residual.output_shape == (None, 1)


@pytest.mark.parametrize("name", EQUATIONS)
def test_what_is_left_is_that_of_differences(name, load):
    """The residual of an untrained network, with the derivatives by differences of what it returns."""
    keras.utils.set_random_seed(1)
    u, residual = load(name)["build"]()
    low, high, by_differences = EQUATIONS[name]
    points = RNG.uniform(low, high, (20, 2))

    def derivative(points, *axes):
        return difference(lambda p: u.predict_on_batch(p.astype("float32")).astype("float64"), points, *axes, h=0.05)

    expected = by_differences(derivative, points)
    found = ops.convert_to_numpy(ops.stop_gradient(residual(points.astype("float32"))))
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


# Compiling the second phase in 100 dimensions takes long on JAX.
FEW = {"poisson_100d": ["--points", "300", "--adam-epochs", "20", "--epochs", "0"]}
# Compiling them on JAX takes long.
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in EQUATIONS if name != "poisson"]


@pytest.mark.parametrize("name", ["poisson", "poisson_100d", *SLOW])
def test_it_runs_and_draws(name, load, tmp_path):
    options = FEW.get(name, ["--adam-epochs", "20", "--epochs", "2"])
    errors = load(name)["main"](["--out", str(tmp_path), *options])
    assert all(0 < error < 2 for error in errors.values())
    picture = pyplot.imread(tmp_path / f"{name}.png")
    assert picture.shape[1] >= 1000 and picture.std() > 0.1


LIMITS = {"poisson": 5e-4, "poisson_100d": 1e-3, "burgers": 3e-3, "kdv": 3e-3, "plate": 5e-4, "allen_cahn": 2e-2}


@pytest.mark.slow
@pytest.mark.parametrize("name", LIMITS)
def test_the_network_finds_the_solution(name, load, tmp_path):
    errors = load(name)["main"](["--out", str(tmp_path)])
    assert errors["end"] < LIMITS[name]
    # In 100 dimensions, some steps are also taken with random directions.
    assert errors.get("Adam, estimated", 0.0) < 2 * errors["Adam"]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_they_name_no_framework(path):
    text = path.read_text(encoding="utf-8")
    assert not any(f"import {name}" in text for name in ("tensorflow", "jax", "torch"))
