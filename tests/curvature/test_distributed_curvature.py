"""examples/distributed_curvature.py on several devices against the same on one, in processes of their own."""

import os
import pathlib
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_gradtools import backend as kernels

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "distributed_curvature.py"
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
    folder = tmp_path_factory.mktemp("distributed_curvature")
    outs = folder / "one.npz", folder / "several.npz"
    processes = [start(devices, out) for devices, out in zip((1, DEVICES), outs, strict=True)]
    return [finished(process, out) for process, out in zip(processes, outs, strict=True)]


@pytest.mark.parametrize("operator", ["Hessian", "GaussNewton", "Fisher"])
@pytest.mark.parametrize("what", ["loss", "gradient", "product", "products", "largest eigenvalue"])
def test_several_devices_equal_one(results, operator, what):
    one, several = (result[f"{operator}/{what}"] for result in results)
    assert np.abs(one).max() > 0
    np.testing.assert_allclose(several, one, rtol=0, atol=1e-4 * np.abs(one).max())


def test_on_one_device_nothing_is_shared():
    x = keras.ops.ones((4, 2))
    assert kernels.spread(x) is x
    v = keras.Variable(1.0)
    seen = []
    total = kernels.summed_over_replicas(lambda batch: seen.append(batch) or batch[0], (x,), v)
    assert len(seen) == 1 and total is x
    (total,), count = kernels.summed_over_processes([x], 3)
    assert total is x and count == 3
