"""The example of a `train_step`: it trains both networks, and keeps all state."""

import pathlib
import runpy

import keras
import numpy as np
import pytest
from matplotlib import pyplot

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "wgan_gp_train_step.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture(scope="module")
def trained(example):
    keras.utils.set_random_seed(0)
    gan = example["build"]()
    before = [v.numpy() for v in gan.trainable_variables]
    x = example["load_data"](2 * example["CRITIC_STEPS"] * example["BATCH_SIZE"])
    history = gan.fit(x, batch_size=len(x) // 2, epochs=2, verbose=0).history
    return gan, before, history, x


def test_the_step_fits_the_backend(trained, backend):
    assert type(trained[0]).__name__ == ("StatelessWGANGP" if backend == "jax" else "WGANGP")


def test_the_critic_takes_five_steps_for_one_of_the_generator(trained):
    gan = trained[0]
    assert int(gan.optimizer.iterations) == 4
    assert int(gan.critic_optimizer.iterations) == 20


def test_all_weights_are_trained_and_finite(trained):
    gan, before, history, _ = trained
    for variable, old in zip(gan.trainable_variables, before, strict=True):
        new = variable.numpy()
        assert np.isfinite(new).all()
        # The last bias of the critic cancels in the difference of two scores.
        if variable is not gan.critic.layers[-1].bias:
            assert np.abs(new - old).max() > 0, variable.path
    assert np.isfinite(history["distance"]).all()


def test_the_critic_learns_to_tell_real_from_generated(trained):
    gan, _, history, x = trained
    assert history["distance"][1] > history["distance"][0]
    real, fake = (gan.critic.predict(p, verbose=0).mean() for p in (x, gan.predict(x, verbose=0)))
    assert real > fake


def test_noise_differs_from_step_to_step(trained):
    gan, *_, x = trained
    first, second = (gan.predict(x[:64], verbose=0) for _ in range(2))
    assert np.abs(first - second).max() > 0


def test_the_measure_of_points(example):
    modes = example["modes"]()
    assert example["measure"](np.repeat(modes, 5, axis=0)) == (1.0, 0.125)
    assert example["measure"](0 * modes)[0] == 0.0


def test_leaves_its_picture(example, trained, tmp_path):
    gan, *_, x = trained
    example["draw"](gan, x, x, tmp_path / "picture.png")
    assert pyplot.imread(tmp_path / "picture.png")[..., :3].std() > 0.03
    assert pyplot.get_fignums() == []
