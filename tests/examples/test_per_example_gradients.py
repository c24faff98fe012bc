"""The example of the gradients of single examples: they reveal wrong labels and predict noise."""

import pathlib
import runpy

import numpy as np
import pytest
from keras import ops
from matplotlib import pyplot

import keras_gradtools as kg

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "per_example_gradients.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture(scope="module")
def quick(example, tmp_path_factory):
    out = tmp_path_factory.mktemp("pictures") / "out"
    return out, example["main"](["--epochs", "8", "--out", str(out)])


def test_wrong_labels_have_long_gradients(quick, example):
    gradients, is_wrong, *_ = quick[1]
    assert is_wrong[example["suspects"](gradients, 50)].mean() > 0.7
    assert is_wrong.mean() < 0.1


def test_gradients_average_to_that_of_the_loss(quick, example):
    gradients, *_ = quick[1]
    x, y, _ = example["load_data"]()
    model = example["build"]()
    found = example["example_gradients"](model, x[:16], y[:16]).mean(axis=0)
    with kg.GradientTape() as tape:
        loss = example["LOSS"](y[:16], model(x[:16]))
    expected = tape.gradient(loss, model.trainable_variables)
    expected = np.concatenate([ops.convert_to_numpy(g).ravel() for g in expected])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert gradients.shape == (len(x), len(expected))


def test_noise_of_batches_is_as_predicted(quick):
    _, _, noise, measured, scales = quick[1]
    for size, value in measured.items():
        assert value == pytest.approx(noise.covariance_trace / size, rel=0.2)
    assert scales[1] > scales[0]


def test_leaves_its_picture(quick):
    (path,) = quick[0].iterdir()
    assert path.name == "per_example_gradients.png"
    assert pyplot.imread(path)[..., :3].std() > 0.03
    assert pyplot.get_fignums() == []
