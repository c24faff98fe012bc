"""The example of the heat equation: its equation is the right one, and Levenberg-Marquardt solves it."""

import pathlib
import runpy

import numpy as np
import pytest
from keras import ops
from matplotlib import pyplot

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "heat_equation.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


def test_the_solution_solves_the_equation(example):
    points, h = np.random.default_rng(0).uniform(0.1, 0.9, (50, 2)), 1e-4
    solution, along_x, along_t = example["solution"], np.array([h, 0]), np.array([0, h])
    u_t = (solution(points + along_t) - solution(points - along_t)) / (2 * h)
    u_xx = (solution(points + along_x) - 2 * solution(points) + solution(points - along_x)) / h**2
    np.testing.assert_allclose(u_t, example["DIFFUSIVITY"] * u_xx, atol=1e-5)


def test_start_and_ends_are_right_whatever_the_network_says(example):
    temperature, _ = example["build"](0)
    s = np.linspace(0, 1, 11)
    for points in (np.stack([s, 0 * s], 1), np.stack([0 * s, s], 1), np.stack([0 * s + 1, s], 1)):
        found = ops.convert_to_numpy(ops.stop_gradient(temperature(points.astype("float32"))))
        np.testing.assert_allclose(found, example["solution"](points), atol=1e-6)


def test_what_is_left_is_that_of_differences(example):
    temperature, equation = example["build"](0)
    points, h = np.random.default_rng(0).uniform(0.1, 0.9, (20, 2)).astype("float32"), 1e-2

    def u(x=0.0, t=0.0):
        moved = points + np.array([x, t], "float32")
        return ops.convert_to_numpy(ops.stop_gradient(temperature(moved))).astype("float64")

    u_t = (u(t=h) - u(t=-h)) / (2 * h)
    u_xx = (-u(x=2 * h) + 16 * u(x=h) - 30 * u() + 16 * u(x=-h) - u(x=-2 * h)) / (12 * h**2)
    left = ops.convert_to_numpy(ops.stop_gradient(equation(points)))
    np.testing.assert_allclose(left, u_t - example["DIFFUSIVITY"] * u_xx, atol=2e-2)


def test_it_runs_and_draws(example, tmp_path):
    errors = example["main"](["--out", str(tmp_path), "--adam-epochs", "40", "--epochs", "2"])
    assert all(0 < error < 1 for error in errors.values())
    picture = pyplot.imread(tmp_path / "heat_equation.png")
    assert picture.shape[1] > 1000 and picture.std() > 0.1


@pytest.mark.slow
def test_levenberg_marquardt_goes_far_below_adam(example, tmp_path):
    errors = example["main"](["--out", str(tmp_path)])
    assert errors["both"] < 1e-3 and errors["both"] < 0.02 * errors["Adam alone"] < errors["Adam"]
