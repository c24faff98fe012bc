"""The peak memory of computing the largest Hessian eigenvalue for 10 million weights.

Run it as `python -m benchmarks.curvature_memory`.

Measures a gradient, and the Lanczos method with a basis of 8 vectors after 1 and after 6 restarts, each in a separate
process. Writes benchmarks/results/BACKEND_curvature_memory.json. For Linux only.
"""

import argparse
import json
import os
import subprocess
import sys

from benchmarks.run import BACKENDS, RESULTS, ROOT, environment_of

UNITS, BATCH, BASIS = (1000, 2000, 2000, 2000, 10), 64, 8
RESTARTS = (1, 6)
# The target for the memory that `eigsh` needs in addition to a gradient, in multiples of the weights' memory.
TARGET = 16


def build():
    """Returns the Hessian of the loss of a network with tanh."""
    import keras
    import numpy as np
    from keras import layers

    import keras_gradtools as kg

    keras.utils.set_random_seed(0)
    hidden = [layers.Dense(n, activation="tanh") for n in UNITS[1:-1]]
    model = keras.Sequential([layers.Input(UNITS[:1]), *hidden, layers.Dense(UNITS[-1])])
    random = np.random.default_rng(0)
    x = random.normal(size=(BATCH, UNITS[0])).astype("float32")
    y = random.integers(0, UNITS[-1], BATCH).astype("int32")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return kg.curvature.Hessian(model, loss, (x, y), batch_size=BATCH, verbose=0)


def eigenvalue(hessian, restarts):
    """The estimate of the largest eigenvalue after the given number of restarts."""
    from keras_gradtools.curvature import EigenvalueConvergenceError

    try:
        # A tolerance that is never met.
        hessian.eigsh(k=1, ncv=BASIS, max_restarts=restarts, tol=1e-14)
    except EigenvalueConvergenceError as error:
        return float(error.eigenvalues[-1])
    raise AssertionError(f"The eigenvalue converged before {restarts} restarts, so their memory was not measured.")


def measure_here(restarts):
    """Prints the peak memory of a gradient (if `restarts` is None) or of the Lanczos method."""
    from benchmarks import hand_written, memory

    hand_written.module().use_one_thread()
    hessian = build()
    block = hand_written.module().block
    if restarts is None:
        print(memory.peak_mib(hessian.gradient, block, warm_ups=2, runs=2))
    else:
        hessian.gradient()
        eigenvalue(hessian, 1)
        print(memory.peak_mib(lambda: eigenvalue(hessian, restarts), block, warm_ups=0, runs=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="may be repeated")
    parser.add_argument("--of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.of is not None:
        return measure_here(None if options.of == "gradient" else int(options.of))
    parameters = sum(a * b + b for a, b in zip(UNITS, UNITS[1:], strict=False))
    weights_mib = round(4 * parameters / 2**20, 1)
    for backend in options.backend or BACKENDS:
        peaks = {}
        for of in ("gradient", *map(str, RESTARTS)):
            environment = {**os.environ, **environment_of(backend), "MALLOC_MMAP_THRESHOLD_": "65536"}
            command = [sys.executable, "-m", "benchmarks.curvature_memory", f"--of={of}"]
            done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
            peaks[of] = float(done.stdout.split()[-1])
            over = (peaks[of] - peaks["gradient"]) / weights_mib
            what = of if of == "gradient" else f"eigenvalue, restarts {of}"
            print(f"{backend}, {what}: {peaks[of]:.0f} MiB, over a gradient {over:.1f} times the weights", flush=True)
        result = {
            "backend": backend,
            "parameters": parameters,
            "weights_mib": weights_mib,
            "basis": BASIS,
            "gradient_mib": peaks.pop("gradient"),
            "by_restarts_mib": peaks,
            "target_in_weights": TARGET,
        }
        (RESULTS / f"{backend}_curvature_memory.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
