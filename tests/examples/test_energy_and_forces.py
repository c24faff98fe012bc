"""The example of energies and forces: its forces are right, help the energies, and conserve them."""

import pathlib
import runpy

import numpy as np
import pytest
from matplotlib import pyplot

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "energy_and_forces.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture(scope="module")
def quick(example, tmp_path_factory):
    out = tmp_path_factory.mktemp("energy_and_forces") / "out"
    return out, example["main"](["--quick", "--out", str(out)])


@pytest.fixture(scope="module")
def data(example):
    return example["load_data"]()


@pytest.fixture(scope="module")
def trained(example, data):
    """A model after a few epochs, and the clusters that it was not trained on."""
    (x, y), (x_test, _) = data
    return example["train"](x, y, 1.0, 3)[0], x_test


def test_true_forces_are_minus_the_gradient_of_the_energy(example, data):
    x = data[0][0][:5].astype("float64")
    direction = np.random.default_rng(3).normal(size=x.shape)
    after, before = (example["morse"](x + step * direction)[0] for step in (1e-5, -1e-5))
    along = -(example["morse"](x)[1] * direction).sum(axis=(1, 2))
    np.testing.assert_allclose((after - before) / 2e-5, along, rtol=1e-6, atol=1e-6)


def test_forces_of_the_model_are_minus_the_gradient_of_its_energy(trained):
    model, x = trained
    x = x[:8]
    direction = np.random.default_rng(3).normal(size=x.shape).astype("float32")
    forces = model.predict(x, verbose=0)["forces"]
    after, before = (model.predict(x + step * direction, verbose=0)["energy"][:, 0] for step in (5e-3, -5e-3))
    along = -(forces * direction).sum(axis=(1, 2))
    np.testing.assert_allclose((after - before) / 1e-2, along, rtol=1e-2, atol=1e-2 * np.abs(along).max())


def test_model_keeps_momentum(trained):
    model, x = trained
    forces = model.predict(x[:8], verbose=0)["forces"]
    assert np.abs(forces.sum(axis=1)).max() < 1e-4 * np.abs(forces).max()


def test_training_on_forces_improves_energies_and_forces(quick):
    _, results = quick
    alone, both = results["energies"], results["energies and forces"]
    assert both["energy error"] < 0.9 * alone["energy error"]
    assert both["force error"] < 0.5 * alone["force error"]
    assert both["drift"] < 0.7 * alone["drift"]
    assert both["loss"][-1] < 0.2 * both["loss"][0]


def test_model_conserves_its_own_energy(quick):
    _, results = quick
    for result in results.values():
        assert result["own drift"] < 0.05


def test_energy_error_is_of_second_order_in_the_time_step(example, trained):
    model, x = trained
    position, velocity = x[:16], np.random.default_rng(1).normal(0.0, 0.5, x[:16].shape).astype("float32")
    errors = [
        example["root_mean_square"](example["drifts"](model, position, velocity, steps, 0.8 / steps)[0])
        for steps in (20, 40)
    ]
    # As Verlet's method has it where the forces are the gradient of the energy, and not otherwise.
    assert 3.0 < errors[0] / errors[1] < 5.0


def test_leaves_its_picture(quick):
    out, _ = quick
    (path,) = out.iterdir()
    assert path.name == "energy_and_forces.png"
    assert pyplot.imread(path)[..., :3].std() > 0.05
    assert pyplot.get_fignums() == []
