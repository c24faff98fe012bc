"""examples/distributed_second_order.py on several devices against the same on one, in processes of their own."""

import os
import pathlib
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "distributed_second_order.py"
BACKEND = keras.config.backend()
DEVICES = {"jax": 8, "tensorflow": 2, "torch": 2}[BACKEND]
SECONDS = 600


def start(devices, out):
    environment = {**os.environ, "KERAS_BACKEND": BACKEND, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), "--devices", str(devices), "--out", str(out)]
    with out.with_suffix(".txt").open("w") as log:
        # A session of its own, which can be ended as a whole: torchrun has children.
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def finished(process, out):
    try:
        code = process.wait(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    assert code == 0, out.with_suffix(".txt").read_text()[-4000:]
    return dict(np.load(out))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed_second_order")
    outs = folder / "one.npz", folder / "several.npz"
    processes = [start(devices, out) for devices, out in zip((1, DEVICES), outs, strict=True)]
    return [finished(process, out) for process, out in zip(processes, outs, strict=True)]


@pytest.mark.parametrize("optimizer", ["Newton", "NewtonCG", "NewtonCG, Gauss-Newton", "LevenbergMarquardt"])
def test_several_devices_equal_one(results, optimizer):
    one, several = results
    keys = [key for key in one if key.startswith(f"{optimizer}/")]
    assert len(keys) == 9
    assert np.all(np.diff(one[f"{optimizer}/loss"]) < 0)
    if optimizer == "NewtonCG, Gauss-Newton":
        # As many as make a preconditioner, before the last steps.
        assert one[f"{optimizer}/cg_iterations"][2] >= 10
    for key in keys:
        if key.endswith("/cg_iterations"):
            np.testing.assert_allclose(several[key], one[key], atol=4)
            continue
        # The damping goes by a ratio of small differences.
        tolerance = 1e-3 if key.endswith("/damping") else 1e-4
        np.testing.assert_allclose(several[key], one[key], rtol=0, atol=tolerance * np.abs(one[key]).max(), err_msg=key)
