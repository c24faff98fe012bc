"""The example of a spectrum: outliers, and the learning rate that the largest one allows."""

import pathlib
import runpy

import numpy as np
import pytest
from matplotlib import pyplot

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "hessian_spectrum.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture(scope="module")
def quick(example, tmp_path_factory):
    out = tmp_path_factory.mktemp("pictures") / "out"
    return out, example["main"](["--quick", "--out", str(out)])


def test_a_few_eigenvalues_stand_out(quick):
    found, _ = quick[1]
    after = found["after training"]
    assert after["largest"][0] > 5 * after["largest"][-1]
    assert after["near zero"] > 0.6
    assert after["smallest"] < 0 < after["largest"][-1]


def test_the_gauss_newton_part_explains_them(quick):
    after = quick[1][0]["after training"]
    assert 0.5 < after["gauss_newton"][0] / after["largest"][0] < 1.5


def test_a_step_multiplies_the_top_direction_as_the_eigenvalue_says(quick):
    for factor, growth in quick[1][1].items():
        assert growth == pytest.approx(1 - factor, abs=0.05)


def test_the_share_near_zero(example):
    class Density:
        nodes = np.array([[0.0, 0.5, np.nan], [-0.1, 2.0, 3.0]])
        weights = np.array([[0.75, 0.25, np.nan], [0.5, 0.25, 0.25]])

    assert example["share_near_zero"](Density, 0.2) == pytest.approx(0.625)


def test_leaves_its_picture(quick):
    (path,) = quick[0].iterdir()
    assert path.name == "hessian_spectrum.png"
    assert pyplot.imread(path)[..., :3].std() > 0.03
    assert pyplot.get_fignums() == []
