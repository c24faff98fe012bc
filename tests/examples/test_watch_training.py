"""The example of the monitors: what they saw of a network that cannot learn, and of one that does."""

import pathlib
import runpy

import numpy as np
import pytest
from matplotlib import pyplot

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "watch_training.py"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out = tmp_path_factory.mktemp("watch_training") / "out"
    return out, runpy.run_path(str(EXAMPLE))["main"](["--out", str(out), "--epochs", "4"])


def test_gradients_vanish_through_sigmoids_and_not_through_relu(ran):
    histories = {name: history for name, (history, _, _) in ran[1].items()}
    shares = {
        name: history["gradient_norm/hidden_1"][0] / history["gradient_norm/out"][0]
        for name, history in histories.items()
    }
    assert shares["sigmoid"] < 1e-4 and shares["ReLU"] > 1e-2
    assert histories["sigmoid"]["accuracy"][-1] < 0.2 and histories["ReLU"]["accuracy"][-1] > 0.7


def test_outputs_hardly_depend_on_inputs_through_sigmoids(ran):
    histories = {name: history for name, (history, _, _) in ran[1].items()}
    assert histories["sigmoid"]["jacobian_spectral_norm_mean"][-1] < 1e-3
    assert histories["ReLU"]["jacobian_spectral_norm_mean"][-1] > 1
    assert "dead_units" not in histories["sigmoid"] and 0 <= histories["ReLU"]["dead_units"][-1] < 1


def test_what_it_leaves(ran):
    out, found = ran
    picture = pyplot.imread(out / "watch_training.png")
    assert picture.shape[1] > 800 and np.std(picture) > 0.1
    for name in found:
        assert len(list((out / "logs" / name).glob("events.out.tfevents.*"))) == 1
