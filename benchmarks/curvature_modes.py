"""The time of products with a curvature operator: `python -m benchmarks.curvature_modes`.

Compares a product from a gradient that one tape has recorded for all products, the compiled product (eager on torch)
and a gradient. They are timed
alternately in one process for each backend, and the medians are reported. Writes
benchmarks/results/BACKEND_curvature_modes.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time

from benchmarks.run import BACKENDS, RESULTS, ROOT, environment_of

BATCHES = {"MLP": 256, "conv net": 64, "wide MLP": 512, "small MLP": 256}
WARM_UPS = 3


def measure(runs):
    import keras
    import numpy as np

    import keras_gradtools as kg
    from benchmarks import models
    from keras_gradtools.backend import name
    from keras_gradtools.curvature.operators.linearized_products import matvec_by_one_tape

    results = []
    for model_name, batch in BATCHES.items():
        model = models.build(model_name)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        hessian = kg.curvature.Hessian(model, loss, models.data(model, batch), batch_size=batch, verbose=0)
        v = np.random.default_rng(0).normal(size=hessian.shape[0]).astype("float32")
        cached = matvec_by_one_tape(hessian._sums)
        ways = {"one tape": lambda: cached(v), "product": lambda: hessian @ v, "gradient": hessian.gradient}  # noqa: B023
        seconds = {way: [] for way in ways}
        for i in range(WARM_UPS + runs):
            for way, run in ways.items():
                start = time.perf_counter()
                run()
                if i >= WARM_UPS:
                    seconds[way].append(time.perf_counter() - start)
        ms = {way: 1e3 * float(np.median(values)) for way, values in seconds.items()}
        error = np.abs(cached(v) - hessian @ v).max() / np.abs(hessian @ v).max()
        print(
            f"{name()}, {model_name}, {batch}: one tape {ms['one tape']:.2f} ms, product {ms['product']:.2f} ms, "
            f"gradient {ms['gradient']:.2f} ms; one tape / product {ms['one tape'] / ms['product']:.2f}, "
            f"product / gradient {ms['product'] / ms['gradient']:.2f}; relative difference {error:.0e}",
            flush=True,
        )
        in_ms = {f"{way.replace(' ', '_')}_ms": round(value, 3) for way, value in ms.items()}
        results.append({"model": model_name, "batch": batch, **in_ms})
    (RESULTS / f"{name()}_curvature_modes.json").write_text(json.dumps(results, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="may be repeated")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        return measure(options.runs)
    for backend in options.backend or BACKENDS:
        command = [sys.executable, "-m", "benchmarks.curvature_modes", "--here", f"--runs={options.runs}"]
        subprocess.run(command, cwd=ROOT, env={**os.environ, **environment_of(backend)}, check=True)


if __name__ == "__main__":
    main()
