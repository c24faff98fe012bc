"""The WGAN-GP example trains, and makes neither of the two mistakes that are made most often."""

import pathlib
import runpy

import keras
import numpy as np
import pytest
from keras import ops
from matplotlib import pyplot

import keras_gradtools as kg

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "wgan_gp.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture(scope="module")
def quick(example, tmp_path_factory):
    out = tmp_path_factory.mktemp("wgan_gp") / "out"
    return out, example["main"](["--quick", "--out", str(out)])


def test_fit_trains_the_generator_once_and_the_critic_five_times(quick):
    _, numbers = quick
    generator, critic = numbers["steps"]
    assert critic == 5 * generator > 0


def test_generated_digits_come_near_to_real_ones(quick):
    _, numbers = quick
    assert numbers["generated"] < 0.7 * numbers["untrained"]
    # The critic first learns to tell them apart, and then finds ever less to tell.
    assert numbers["distance"][-1] < 0.5 * max(numbers["distance"])
    assert numbers["val_distance"][-1] < 0.5 * max(numbers["val_distance"])


def test_gradient_norm_is_held_near_one(quick):
    _, numbers = quick
    assert abs(numbers["gradient_norm"][-1] - 1.0) < 0.2


def test_leaves_its_picture(quick):
    out, _ = quick
    (path,) = out.iterdir()
    assert path.name == "wgan_gp.png"
    assert pyplot.imread(path)[..., :3].std() > 0.05
    assert pyplot.get_fignums() == []


def test_penalty_takes_a_norm_for_each_example(example):
    norms = np.array([0.5, 1.0, 2.0, 4.0])
    rng = np.random.default_rng(0)
    slopes = rng.normal(size=(4, 8, 8, 1))
    slopes *= (norms / np.sqrt((slopes**2).sum(axis=(1, 2, 3))))[:, None, None, None]
    slopes = ops.convert_to_tensor(slopes.astype("float32"))

    def critic(images):  # linear, with a slope for each place in the batch
        return ops.sum(images * slopes, axis=(1, 2, 3))[:, None]

    images = ops.convert_to_tensor(rng.normal(size=(4, 8, 8, 1)).astype("float32"))
    expected = np.mean((norms - 1.0) ** 2)
    over_the_batch = (np.sqrt(np.sum(norms**2)) - 1.0) ** 2
    assert abs(expected - over_the_batch) > 1.0  # so that the mistake would be seen
    assert float(example["gradient_penalty"](critic, images)) == pytest.approx(expected, rel=1e-5)
    assert float(example["gradient_norm"](critic, images)) == pytest.approx(norms.mean(), rel=1e-5)


def test_penalty_trains_the_critic(example):
    critic = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(1)])
    kernel = ops.convert_to_numpy(critic.layers[-1].kernel)
    with kg.GradientTape() as tape:
        penalty = example["gradient_penalty"](critic, ops.zeros((6, 8, 8, 1)))
    gradient = tape.gradient(penalty, critic.layers[-1].kernel)
    length = np.linalg.norm(kernel)
    expected = 2.0 * (length - 1.0) * kernel / length
    np.testing.assert_allclose(ops.convert_to_numpy(gradient), expected, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def epsilons(example):
    """Where on its segment each pixel of each of 4000 mixed images lies: 0 is the fake one, 1 the real one."""
    rng = np.random.default_rng(0)
    fake = rng.normal(size=(4000, 8, 8, 1)).astype("float32")
    apart = (rng.choice([-1.0, 1.0], fake.shape) * rng.uniform(1.0, 2.0, fake.shape)).astype("float32")
    mixed = example["interpolate"](ops.convert_to_tensor(fake + apart), ops.convert_to_tensor(fake), seed=1)
    return (ops.convert_to_numpy(mixed) - fake) / apart


def test_mixed_images_lie_on_the_segment_between_their_pair(epsilons):
    # All pixels of an image are the same part of the way along.
    assert np.ptp(epsilons, axis=(1, 2, 3)).max() < 1e-5
    assert epsilons.min() > -1e-5
    assert epsilons.max() < 1.0 + 1e-5


def test_mixed_images_are_uniform_along_the_segment(epsilons):
    sample = np.sort(epsilons.mean(axis=(1, 2, 3)))
    # The Kolmogorov-Smirnov distance from the uniform distribution; a thousandth of samples this large exceed it.
    assert np.abs(sample - (np.arange(4000) + 0.5) / 4000).max() < 1.95 / np.sqrt(4000)
    # Neighbors in the batch have numbers of their own.
    drawn = epsilons.mean(axis=(1, 2, 3))
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.06
