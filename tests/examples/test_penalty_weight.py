"""The example of the choice of a weight: it sweeps, chooses and draws."""

import pathlib
import runpy

import numpy as np
import pytest
from matplotlib import pyplot

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "penalty_weight.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture(scope="module")
def quick(example, tmp_path_factory):
    out = tmp_path_factory.mktemp("pictures") / "out"
    return out, example["main"](["--quick", "--out", str(out)])


def test_the_penalty_helps_and_is_chosen(quick):
    sweep, results = quick[1]
    assert sweep.penalty_weights.tolist() == [0.0, 0.01]
    assert sweep.attacked[1, 0] > sweep.attacked[0, 0]
    assert sweep.suggestion in sweep.penalty_weights
    assert not sweep.masked.any()
    assert np.all(sweep.attacked < sweep.clean)
    clean, attacked = results["suggested"]
    assert 0.5 < clean <= 1
    assert attacked < clean


def test_leaves_its_picture(quick):
    (path,) = quick[0].iterdir()
    assert path.name == "penalty_weight.png"
    assert pyplot.imread(path)[..., :3].std() > 0.03
    assert pyplot.get_fignums() == []
