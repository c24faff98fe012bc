"""The example of Jacobian regularization: what it is said to do, it does, and its plane is right."""

import pathlib
import runpy

import keras
import numpy as np
import pytest
from keras import ops
from matplotlib import pyplot

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "jacobian_regularization.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture(scope="module")
def quick(example, tmp_path_factory):
    out = tmp_path_factory.mktemp("jacobian_regularization") / "out"
    return out, example["main"](["--quick", "--out", str(out)])


@pytest.fixture
def linear():
    keras.utils.set_random_seed(2)
    return keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(10)])


def test_all_models_read_the_digits(quick):
    _, results = quick
    for result in results.values():
        assert result["noise"][0] == result["attack"][0] > 0.85


@pytest.mark.parametrize("name", ["one projection", "exact"])
def test_regularization_shrinks_the_jacobian_and_helps_against_attacks(quick, name):
    _, results = quick
    assert results[name]["jacobian"] < 0.3 * results["plain"]["jacobian"]
    assert results[name]["attack"][2] > results["plain"]["attack"][2] + 0.1


def test_one_projection_does_what_the_exact_norm_does(quick):
    _, results = quick
    assert results["one projection"]["jacobian"] == pytest.approx(results["exact"]["jacobian"], rel=0.3)


def test_margins_are_measured(quick):
    _, results = quick
    for name in ("plain", "one projection"):
        assert len(results[name]["margins"]) == 3
        assert min(results[name]["margins"]) > 0.0


def test_weight_is_half_of_lambda(example, linear):
    regularized = example["build_models"]()[1]
    assert regularized.weight == example["LAMBDA"] / 2
    kernel = ops.convert_to_numpy(linear.layers[-1].kernel)
    images = np.zeros((3, 8, 8, 1), "float32")
    assert example["jacobian_norm"](linear, images) == pytest.approx(np.linalg.norm(kernel), rel=1e-5)


def test_plane_goes_through_its_images_and_keeps_lengths(example):
    images = np.random.default_rng(0).uniform(size=(3, 8, 8, 1)).astype("float32")
    grid, (u, v), corners = example["plane_through"](images, 200)
    between = [np.linalg.norm(images[i] - images[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    in_picture = [np.linalg.norm(corners[i] - corners[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    np.testing.assert_allclose(in_picture, between, rtol=1e-5)
    spacing = u[0, 1] - u[0, 0]
    for image, corner in zip(images, corners, strict=True):
        nearest = np.argmin(np.hypot(u - corner[0], v - corner[1]))
        assert np.linalg.norm(grid[nearest] - image) < spacing


def test_leaves_its_picture(quick):
    out, _ = quick
    (path,) = out.iterdir()
    assert path.name == "jacobian_regularization.png"
    assert pyplot.imread(path)[..., :3].std() > 0.05
    assert pyplot.get_fignums() == []
