"""The example of Newton steps on the last layer: each goes down, touches that layer alone, and training gains by it."""

import pathlib
import runpy

import numpy as np
import pytest
from matplotlib import pyplot

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "newton_last_layer.py"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out = tmp_path_factory.mktemp("newton_last_layer")
    history, watched = runpy.run_path(str(EXAMPLE))["main"](["--out", str(out), "--epochs", "4"])
    return out, history, watched


def test_every_step_goes_down(ran):
    _, history, _ = ran
    assert history["newton_step_reason"] == [0, 0, 0, 0]
    assert min(history["newton_decrease"]) > 0
    assert np.all(np.abs(np.array(history["newton_ratio"]) - 1) < 0.5)


def test_it_is_far_ahead_of_adam_alone(ran):
    _, _, watched = ran
    alone, both = watched["Adam"], watched["Adam and Newton steps"]
    assert both.losses[0] < 0.6 * alone.losses[0] and both.losses[-1] < 0.5 * alone.losses[-1]
    assert both.accuracies[-1] > alone.accuracies[-1]


def test_the_picture(ran):
    out, _, _ = ran
    picture = pyplot.imread(out / "newton_last_layer.png")
    assert picture.shape[1] > 800 and picture.std() > 0.1
