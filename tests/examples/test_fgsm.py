"""The FGSM example: the attack of the tutorial's code is ours, and it makes the model err."""

import contextlib
import io
import pathlib
import re
import runpy

import numpy as np
import pytest

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "fgsm.py"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out, printed = tmp_path_factory.mktemp("fgsm") / "out", io.StringIO()
    with contextlib.redirect_stdout(printed):
        found = runpy.run_path(str(EXAMPLE))["main"](["--out", str(out)])
    return out, printed.getvalue(), found


def test_the_tape_and_the_attack_agree(ran):
    differences = [float(d) for d in re.findall(r"differs by (\S+)\)", ran[1])]
    assert differences == [0.0] * 4


def test_the_image_moves_by_epsilon_and_the_model_errs_or_wavers(ran):
    _, _, found = ran
    clean, *others = (image for image, _, _ in found)
    for epsilon, image in zip((0.1, 0.2, 0.3), others, strict=True):
        assert np.abs(image - clean).max() == pytest.approx(epsilon, abs=1e-6)
    # Which of the two depends on the weights, to which each version of Keras trains differently.
    assert found[-1][1] != found[0][1] or found[-1][2] < found[0][2] - 0.1


def test_accuracy_falls_with_the_strength(ran):
    accuracies = [float(a) for a in re.findall(r"([\d.]+)% of 300", ran[1])]
    assert accuracies[0] > 85
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[-1] < 50


def test_picture(ran):
    assert [path.name for path in ran[0].iterdir()] == ["fgsm.png"]
