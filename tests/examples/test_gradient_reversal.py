"""The example of a reversed gradient: it trains both ways, and measures both domains."""

import pathlib
import runpy

import numpy as np
import pytest
from matplotlib import pyplot

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "gradient_reversal.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture(scope="module")
def quick(example, tmp_path_factory):
    out = tmp_path_factory.mktemp("pictures") / "out"
    return out, example["main"](["--epochs", "4", "--seeds", "1", "--out", str(out)])


def test_both_ways_learn_the_labels(quick):
    results = quick[1]
    assert list(results) == ["without reversal", "with reversal"]
    for found in results.values():
        ((labeled, turned, told_apart),) = found
        assert labeled > 0.75
        assert turned > 0.5
        assert 0.3 < told_apart < 1


def test_the_moons_are_centered_and_turned(example):
    (x, y), (turned, _) = (example["moons"](np.random.default_rng(3), degrees) for degrees in (0.0, 90.0))
    np.testing.assert_allclose(turned, np.stack([-x[:, 1], x[:, 0]], axis=1), atol=1e-6)
    assert abs(y.mean() - 0.5) < 0.1


def test_the_ramp_goes_from_no_reversal_to_all(example):
    model, _ = example["build"](0.3)
    ramp = example["Ramp"](10)
    ramp.set_model(model)
    scales = []
    for epoch in (0, 1, 10):
        ramp.on_epoch_begin(epoch)
        scales.append(float(model.get_layer("reverse").scale.numpy()))
    np.testing.assert_allclose(scales, [0.0, np.tanh(0.5), 1.0], rtol=1e-4)


def test_leaves_its_picture(quick):
    (path,) = quick[0].iterdir()
    assert path.name == "gradient_reversal.png"
    assert pyplot.imread(path)[..., :3].std() > 0.03
    assert pyplot.get_fignums() == []
