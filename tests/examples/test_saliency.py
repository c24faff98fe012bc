"""The example of attributions: integrated gradients are complete, and exact where the model is linear."""

import pathlib
import runpy

import keras
import numpy as np
import pytest
from keras import ops
from matplotlib import pyplot

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "saliency.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture(scope="module")
def quick(example, tmp_path_factory):
    out = tmp_path_factory.mktemp("pictures") / "out"
    return out, example["main"](["--epochs", "2", "--images", "20", "--out", str(out)])


def test_integrated_gradients_add_up_to_the_change_of_the_score(quick):
    errors, _ = quick[1]
    assert errors[128] < 0.1 * errors[2]
    assert errors[128] < 0.05


def test_they_point_at_the_digit(quick):
    _, shares = quick[1]
    # The digit covers a quarter of the image.
    assert min(shares["saliency"], shares["integrated gradients"]) > 0.4


def test_a_linear_model_has_its_attributions_in_closed_form(example):
    model = keras.Sequential([keras.Input((2, 2, 1)), keras.layers.Flatten(), keras.layers.Dense(3)])
    kernel = model.get_weights()[0]
    images = np.random.default_rng(0).normal(size=(2, 2, 2, 1)).astype("float32")
    classes = ops.convert_to_tensor([2, 0])
    for name, factor in (("saliency", 1.0), ("integrated_gradients", images)):
        found = ops.convert_to_numpy(example[name](model, ops.convert_to_tensor(images), classes))
        np.testing.assert_allclose(found, factor * kernel.T[[2, 0]].reshape(2, 2, 2, 1), rtol=1e-5, atol=1e-6)


def test_grad_cam_of_a_mean_is_the_class_activation_map(example):
    x = keras.Input((4, 4, 1))
    features = keras.layers.Conv2D(3, 1, activation="relu", name="features")(x)
    model = keras.Model(x, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(features)))
    images = ops.convert_to_tensor(np.random.default_rng(0).normal(size=(2, 4, 4, 1)).astype("float32"))
    found = ops.convert_to_numpy(example["grad_cam"](model, images, ops.convert_to_tensor([1, 0])))
    activations = ops.convert_to_numpy(keras.Model(x, features)(images))
    weights = model.layers[-1].get_weights()[0].T[[1, 0]] / 16
    expected = np.maximum(np.einsum("bhwc,bc->bhw", activations, weights), 0)
    np.testing.assert_allclose(found[..., 0], expected, rtol=1e-4, atol=1e-6)


def test_leaves_its_picture(quick):
    (path,) = quick[0].iterdir()
    assert path.name == "saliency.png"
    assert pyplot.imread(path)[..., :3].std() > 0.03
    assert pyplot.get_fignums() == []
