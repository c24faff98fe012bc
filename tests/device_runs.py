"""Runs an example on one device and on several, in processes of their own."""

import os
import pathlib
import signal
import subprocess
import sys

import keras
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
BACKEND = keras.config.backend()
DEVICES = {"jax": 8, "tensorflow": 2, "torch": 2}[BACKEND]
SECONDS = 600


def one_and_several(example, folder, *arguments):
    """What the example saves with one device, and with several. Both run at the same time."""
    outs = folder / "one.npz", folder / "several.npz"
    processes = [_start(example, arguments, devices, out) for devices, out in zip((1, DEVICES), outs, strict=True)]
    return [_finished(process, out) for process, out in zip(processes, outs, strict=True)]


def _start(example, arguments, devices, out):
    environment = {**os.environ, "KERAS_BACKEND": BACKEND, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # On JAX, most of the time goes into compiling.
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    command = [sys.executable, str(ROOT / "examples" / example), *arguments]
    command += ["--devices", str(devices), "--out", str(out)]
    with out.with_suffix(".txt").open("w") as log:
        # torchrun has children: in a process group of their own, all of them can be ended.
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def _finished(process, out):
    try:
        code = process.wait(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    assert code == 0, out.with_suffix(".txt").read_text()[-4000:]
    return dict(np.load(out))
