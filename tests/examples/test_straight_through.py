"""The example of weights of few bits: they learn through the rounding."""

import pathlib
import runpy

import numpy as np
import pytest
from keras import ops
from matplotlib import pyplot

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "straight_through.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture(scope="module")
def quick(example, tmp_path_factory):
    out = tmp_path_factory.mktemp("pictures") / "out"
    return out, example["main"](["--epochs", "5", "--bits", "1", "--out", str(out)])


def test_training_with_rounding_keeps_more_than_rounding_afterwards(quick):
    found, without, _ = quick[1]
    assert found[1]["trained with rounding"] > found[1]["rounded afterwards"] + 0.1
    assert without < found[1]["trained with rounding"] - 0.2


def test_the_gradient_is_zero_without_straight_through(quick):
    lengths = quick[1][2]
    assert lengths[False] == 0
    assert lengths[True] > 0.01


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_rounded_kernel_has_few_values(example, bits):
    kernel = np.random.default_rng(0).normal(size=(30, 30)).astype("float32")
    found = ops.convert_to_numpy(example["rounded"](ops.convert_to_tensor(kernel), bits))
    assert len(np.unique(found)) <= 2**bits
    step = 2 * np.abs(kernel).max() / 2**bits
    if bits > 1:
        assert np.abs(found - kernel).max() <= 0.5 * step * (1 + 1e-5)


def test_leaves_its_picture(quick):
    (path,) = quick[0].iterdir()
    assert path.name == "straight_through.png"
    assert pyplot.imread(path)[..., :3].std() > 0.03
    assert pyplot.get_fignums() == []
