"""Physics-informed networks by several optimizers: `python -m benchmarks.pde`.

Six equations are solved by networks with three layers of 20 units, in double precision, on the same 1,000 points (1,500
for Burgers) and from the same weights. Each run has the same time: 15 s of the CPU time of its process, on one core,
without compilation and without the errors that are recorded on the way. CPU time does not depend on what else the
machine does. All methods but Adam begin with Adam for a fifth of it. Adam's learning rate is the best of three on
another seed, on JAX, with a cosine decay. Three seeds on JAX, one on the other backends.

    (nothing)   runs what is missing, and saves each run at once as a line of JSON in benchmarks/results/
    --report    writes docs/pde.md and its picture
"""

import argparse
import os
import subprocess
import sys

from benchmarks.pde import runs
from benchmarks.run import BACKENDS, ROOT, environment_of


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pde", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="may be repeated; all three by default")
    parser.add_argument("--problem", action="append", help="may be repeated; all six by default")
    parser.add_argument("--seed", type=int, action="append", help="may be repeated")
    parser.add_argument("--method", action="append", help="may be repeated; all of the page's table by default")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.report:
        from benchmarks.pde import report

        report.write()
    elif options.here:
        runs.complete(options.backend[0], options.problem[0], options.seed[0], options.method)
    else:
        from benchmarks.pde.problems import PROBLEMS

        names = options.problem or [p.name for p in PROBLEMS]
        for name in names:
            start(runs.TUNED_ON, name, runs.TUNING_SEED, [])
        for seed in sorted({s for seeds in runs.SEEDS.values() for s in seeds}):
            for backend in options.backend or ("jax", "torch", "tensorflow"):
                for name in names:
                    if seed in runs.SEEDS[backend] and (not options.seed or seed in options.seed):
                        start(backend, name, seed, options.method or [])


def start(backend, name, seed, methods):
    command = [sys.executable, "-m", "benchmarks.pde", "--here", "--backend", backend, "--problem", name]
    command += [word for method in methods for word in ("--method", method)]
    environment = {**environment_of(backend), "JAX_ENABLE_X64": "1", "PYTHONPATH": os.fspath(ROOT)}
    subprocess.run([*command, "--seed", str(seed)], cwd=ROOT, env=environment, check=True)


if __name__ == "__main__":
    main()
