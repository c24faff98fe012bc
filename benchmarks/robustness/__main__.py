"""How robust each training method makes a classifier: `python -m benchmarks.robustness`.

The data are digits of 8 x 8 pixels, with a fixed split and 500 test images. The model is a convolutional network (32
and 64 filters, dense 64), trained by `fit` with Adam and cosine decay for 60 epochs. Every image is attacked by PGD (40
steps, 2 restarts, on the cross-entropy and on the margin), with l-infinity strengths from 0.05 to 0.2.

    --choose    run this first: chooses the setting of each method on 297 of the training images, with two seeds. It is
                the one with the best accuracy under attack among those that lose at most 0.5 points of clean accuracy
    (nothing)   trains and attacks with the chosen settings: all methods with five seeds on JAX, and plain, exact and
                two finite-difference methods with three seeds on the other two backends
    --times     measures a training step of each method against a plain step, in pairs
    --report    writes the tables and the plot of docs/robustness.md

Each run is saved at once as one line of JSON in benchmarks/results/. Saved runs are not repeated.
"""

import argparse
import os
import subprocess
import sys

from benchmarks.robustness import runs
from benchmarks.run import BACKENDS, ROOT, environment_of


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.robustness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="may be repeated; all three by default")
    task = parser.add_mutually_exclusive_group()
    for name in ("choose", "times", "report"):
        task.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args()
    if options.report:
        from benchmarks.robustness import report

        report.write()
        return
    backends = [runs.ALL_ON] if options.choose else options.backend or BACKENDS
    if [os.environ.get("KERAS_BACKEND")] != list(backends):
        flag = [f"--{name}" for name in ("choose", "times") if getattr(options, name)]
        for backend in backends:
            command = [sys.executable, "-m", "benchmarks.robustness", "--backend", backend, *flag]
            subprocess.run(command, cwd=ROOT, env=environment_of(backend), check=True)
    elif options.choose:
        runs.choose()
    elif options.times:
        from benchmarks.robustness import times

        times.measure(list(runs.chosen().values()))
    else:
        runs.complete(runs.results_of(backends[0]), runs.wanted_on(backends[0]))


if __name__ == "__main__":
    main()
