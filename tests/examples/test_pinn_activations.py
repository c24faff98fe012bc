"""The example of activations: smooth ones solve the equation, and ReLU has no second derivative."""

import pathlib
import runpy

import numpy as np
import pytest
from matplotlib import pyplot

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "pinn_activations.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture(scope="module")
def quick(example, tmp_path_factory):
    out = tmp_path_factory.mktemp("pictures") / "out"
    return out, example["main"](["--epochs", "12", "--activations", "gelu", "relu", "--out", str(out)])


def test_smooth_activations_fit_the_equation_and_relu_does_not(quick):
    residuals, errors, seconds = quick[1]
    assert residuals["gelu"][-1] < 0.3
    assert residuals["relu"][-1] > 0.4
    assert errors["relu"] > 2 * errors["gelu"]
    assert seconds["relu"] == 0
    assert seconds["gelu"] > 10


def test_the_right_side_is_the_second_derivative_of_the_solution(example):
    x = np.linspace(0.1, 0.9, 9)
    u, h = example["solution"], 1e-4
    np.testing.assert_allclose((u(x + h) - 2 * u(x) + u(x - h)) / h**2, example["right_side"](x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(u(np.array([0.0, 1.0])), 0.0, atol=1e-12)


def test_leaves_its_picture(quick):
    (path,) = quick[0].iterdir()
    assert path.name == "pinn_activations.png"
    assert pyplot.imread(path)[..., :3].std() > 0.03
    assert pyplot.get_fignums() == []
