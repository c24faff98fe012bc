"""examples/distributed.py on several devices against the same on one: ten steps with a penalty in `fit`.

The number of devices is fixed when a framework starts, so that each side is a process of its own.
"""

import argparse
import re
import runpy

import numpy as np
import pytest

from tests.device_runs import BACKEND, DEVICES, ROOT, one_and_several

SCRIPT = ROOT / "examples" / "distributed.py"

# Of these the results do not depend on how the batch is split.
DETERMINED = ["linear", "exact", "finite_difference", "every_other_step", "schedule"]
FAST = [*DETERMINED, "random_projection"]
SLOW = ["batch_normalization", "frozen_statistics"]


def on_one_and_on_several(folder, runs):
    return one_and_several("distributed.py", folder, *runs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def results(folder):
    return on_one_and_on_several(folder, FAST)


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(SCRIPT))


def assert_equal(one, several, run, atol=1e-4):
    keys = [key for key in one if key.startswith(f"{run}/")]
    assert {f"{run}/loss", f"{run}/penalty", f"{run}/weights/0"} <= set(keys) <= set(several)
    for key in keys:
        np.testing.assert_allclose(several[key], one[key], rtol=0, atol=atol, err_msg=key)


@pytest.mark.parametrize("run", DETERMINED)
def test_several_devices_equal_one(results, run):
    one, several = results
    assert_equal(one, several, run)


@pytest.mark.parametrize("run", FAST)
def test_ten_steps_were_trained(results, run):
    _, several = results
    assert several[f"{run}/loss"].shape == several[f"{run}/penalty"].shape == (10,)
    # Much further than what counts as equal.
    assert several[f"{run}/loss"][-1] < several[f"{run}/loss"][0] - 0.2


def test_the_penalty_is_left_out_at_every_other_step(results):
    _, several = results
    assert list(several["every_other_step/penalty"] > 0) == [True, False] * 5


def test_random_projections(results):
    one, several = results
    if BACKEND == "jax":
        assert_equal(one, several, "random_projection")
    else:
        # Each replica draws for its own examples: other numbers, and the same mean.
        np.testing.assert_allclose(several["random_projection/penalty"], one["random_projection/penalty"], rtol=0.25)


def softmax_regression(x, y, kernel, bias):
    """Cross-entropy and penalty in closed form: the gradient of an example is W (p - y)."""
    logits = x.reshape(len(x), -1).astype("float64") @ kernel + bias
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    g = (p - np.eye(10)[y]) @ kernel.T
    return -np.log(p[np.arange(len(y)), y]).mean(), np.square(g).sum(axis=1).mean()


def test_what_is_logged_is_right(results, example):
    _, several = results
    x, y, _ = example["load_data"]()
    run, size = example["RUNS"]["linear"], example["BATCH_SIZE"]
    loss, penalty = softmax_regression(x[:size], y[:size], *example["build_model"](run).get_weights())
    np.testing.assert_allclose(several["linear/penalty"][0], penalty, rtol=1e-5)
    np.testing.assert_allclose(several["linear/loss"][0], loss + run.penalty["weight"] * penalty, rtol=1e-5)
    loss, penalty = softmax_regression(x, y, *(several[f"linear/weights/{i}"] for i in range(2)))
    np.testing.assert_allclose(several["linear/evaluated"], [loss + run.penalty["weight"] * penalty, penalty], 1e-5)


def test_differences_are_printed(results, folder, example, capsys):
    _, several = results
    options = argparse.Namespace(runs=["exact"], devices=DEVICES, compare=folder / "one.npz", out=None)
    changed = {**several, "exact/penalty": several["exact/penalty"] + 0.5}
    example["report"](changed, options)
    loss, penalty, weights = re.search(
        r"largest differences: loss (\S+), penalty (\S+), weights (\S+)", capsys.readouterr().out
    ).groups()
    assert float(loss) < 1e-4 and float(penalty) == pytest.approx(0.5, abs=1e-2) and float(weights) < 1e-4


@pytest.mark.slow
def test_batch_normalization(tmp_path):
    one, several = on_one_and_on_several(tmp_path, SLOW)
    for run in SLOW:
        # On torch, each process uses the statistics of its own examples.
        assert_equal(one, several, run, atol=0.1 if BACKEND == "torch" else 1e-4)
