"""Runs the benchmarks, one process for each backend: `python -m benchmarks.run`.

A run of a part of `rows.PARTS` writes benchmarks/results/BACKEND_PART.json, or BACKEND_memory.json with --memory.
`python -m benchmarks.report` turns these files into docs/benchmarks.md and docs/benchmark_tables.md. With --rows or
--quick, the results are shown but not saved, so that a file always holds one complete run.
"""

import argparse
import itertools
import os
import pathlib
import subprocess
import sys

from benchmarks.rows import PARTS

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BACKENDS = ("tensorflow", "jax", "torch")

# These must be set before a framework is imported. XLA takes the size of its thread pool from NPROC.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "NPROC": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
}


def environment_of(backend):
    return {**os.environ, **ONE_THREAD, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="may be repeated")
    parser.add_argument("--part", action="append", choices=PARTS, help="may be repeated; all parts by default")
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--quick", action="store_true", help="only a few runs of each row, as a test")
    parser.add_argument("--memory", action="store_true", help="measure the Jacobians' peak memory instead of time")
    parser.add_argument("--resume", action="store_true", help="continue a run that was interrupted or failed in part")
    options = parser.parse_args()

    named = os.environ.get("KERAS_BACKEND")
    backends = options.backend or ([named] if named else BACKENDS)
    flags = [f"--rows={options.rows}"]
    flags += [f"--{name}" for name in ("quick", "memory", "resume") if getattr(options, name)]
    failed = []
    # Memory is measured only for Jacobians, which are in the first part.
    parts = ["gradients"] if options.memory else options.part or PARTS
    for backend, part in itertools.product(backends, parts):
        command = [sys.executable, "-m", "benchmarks.measure_backend", f"--part={part}", *flags]
        if subprocess.run(command, cwd=ROOT, env=environment_of(backend), check=False).returncode:
            failed.append(f"{backend} ({part})")
    if failed:
        sys.exit(f"Failed on {', '.join(failed)}")


if __name__ == "__main__":
    main()
