"""The demo: the numbers that it shows are those of the models, and every way of training does what it is for."""

import contextlib
import io
import pathlib
import re
import runpy

import numpy as np
import pytest
from matplotlib import pyplot

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "demo.py"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out, printed = tmp_path_factory.mktemp("demo") / "out", io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(EXAMPLE))["main"](["--quick", "--out", str(out)])
    return out, printed.getvalue()


def row(printed, label):
    (line,) = (line for line in printed.splitlines() if label in line)
    return [float(number) for number in re.findall(r"(\d+\.\d+) ?(?:%|ms|│)", line.split("│", 2)[2])]


def test_every_way_reads_the_digits_and_the_penalty_withstands_attacks(quick):
    _, printed = quick
    assert min(row(printed, "clean accuracy")) > 80
    plain, *others = row(printed, "under PGD, 0.1")
    assert len(others) == 3
    # In so few epochs, noise and attacked images do not help everywhere yet.
    assert others[-1] > plain + 3
    assert np.all(np.less_equal(row(printed, "under PGD, 0.1"), row(printed, "under FGSM, 0.1")))


def test_the_penalty_makes_the_input_gradient_small(quick):
    plain, *_, penalized = row(quick[1], "input gradient, mean norm")
    assert penalized < 0.9 * plain


def test_steps_are_compared_with_the_plain_one(quick):
    _, printed = quick
    times, ratios = row(printed, "training step"), row(printed, "relative to a plain step")
    assert ratios[0] == 1
    np.testing.assert_allclose(ratios, np.divide(times, times[0]), rtol=0.1)


def test_pictures(quick):
    out, _ = quick
    assert sorted(path.name for path in out.iterdir()) == ["batch_jacobian.png", "robustness.png"]
    for path in out.iterdir():
        assert pyplot.imread(path)[..., :3].std() > 0.05
    assert pyplot.get_fignums() == []
