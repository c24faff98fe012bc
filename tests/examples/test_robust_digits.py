"""The example of all methods: each trains, is watched, and withstands more than the plain model."""

import contextlib
import io
import pathlib
import runpy

import pytest
from matplotlib import pyplot

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "robust_digits.py"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out, printed = tmp_path_factory.mktemp("robust_digits") / "out", io.StringIO()
    with contextlib.redirect_stdout(printed):
        results = runpy.run_path(str(EXAMPLE))["main"](["--quick", "--out", str(out)])
    return out, printed.getvalue(), results


@pytest.mark.slow
def test_every_method_withstands_more_than_plain_training(quick):
    _, _, results = quick
    plain = results.pop("plain")
    assert len(results) == 9
    for name, metrics in results.items():
        assert metrics["clean_accuracy"] > 0.75, name
        assert metrics["pgd_0.1_accuracy"] > plain["pgd_0.1_accuracy"] + 0.02, name
        assert metrics["masked_gradients"] == 0, name


@pytest.mark.slow
def test_the_table_and_the_report_are_shown(quick):
    out, printed, results = quick
    for name in results:
        assert f"│ {name}" in printed
    assert "found by the attack" in printed
    assert sorted(path.name for path in out.iterdir()) == ["robust_digits.png", "robust_digits_distances.png"]
    pyplot.close("all")
