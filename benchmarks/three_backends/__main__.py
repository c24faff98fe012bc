"""The backends side by side: `python -m benchmarks.three_backends`.

Each work is computed by TensorFlow, by TensorFlow with XLA, by JAX, and by torch with recorded operations, which are
run one by one or compiled by inductor. Each of these ways has a process of its own. All compute on the same weights and
data, and must give the same values. They are then timed in turns, so that only one computes at a time: 15 rounds of at
least 20 ms each, on one thread. Prints the median times of a call, and the seconds of the first calls, which compile.

A complete run writes benchmarks/results/three_backends.json, or three_backends_gpu.json with `--device gpu`. On a GPU,
the ways compile at the same time, and the calls are timed one after the other.
"""

import argparse
import json
import tempfile
import time

from rich.console import Console

from benchmarks.run import BACKENDS, ROOT
from benchmarks.three_backends import measuring, table
from benchmarks.three_backends.connection import Connection
from benchmarks.three_backends.ways import WAYS
from benchmarks.three_backends.works import WORKS

SECONDS_ON_GPU = 420
QUICK_ROUNDS = 3


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.three_backends",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="may be repeated; all three by default")
    parser.add_argument("--rows", default="", metavar="TEXT", help="only rows with this text in their name or model")
    parser.add_argument("--quick", action="store_true", help=f"only {QUICK_ROUNDS} rounds, as a test")
    parser.add_argument("--cpu-time", action="store_true", help="CPU times, for a busy machine, and no file")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument(
        "--seconds-in-all",
        type=float,
        metavar="S",
        help="fewer rounds of each row, and then no inductor, so that the run takes about this long; "
        f"{SECONDS_ON_GPU} on a GPU by default",
    )
    options = parser.parse_args()
    on_gpu = options.device == "gpu"
    seconds = options.seconds_in_all or (SECONDS_ON_GPU if on_gpu else None)
    numbers = [i for i, work in enumerate(WORKS) if options.rows in str(work)]
    if not numbers:
        parser.error(f"no row has {options.rows!r} in its name or model")
    ways = [way for way in WAYS if way.backend in (options.backend or BACKENDS)]

    start = time.perf_counter()
    clock = measuring.Clock(seconds, len(numbers))
    rounds = QUICK_ROUNDS if options.quick else measuring.ROUNDS
    result: dict = {"device": options.device, "rows": []}
    console = Console(width=170)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        connections = [Connection(way, options.device, folder) for way in ways]
        try:
            for number in numbers:
                cells = measuring.measure(number, connections, clock, rounds, on_gpu, options.cpu_time)
                work = WORKS[number]
                result["rows"].append({"work": work.name, "model": work.model, "batch": work.batch, "cells": cells})
                console.print(table.line(result["rows"][-1]), highlight=False)
            result["workers"] = {c.way.name: c.started for c in connections if c.started}
        finally:
            for connection in connections:
                connection.end()
    result["seconds"] = time.perf_counter() - start
    table.show(console, result)
    if on_gpu and all(worker["device"] == "cpu" for worker in result["workers"].values()):
        console.print("No framework has found a GPU.")
    elif not (options.backend or options.rows or options.quick or options.cpu_time):
        path = table.path(options.device)
        path.write_text(json.dumps(table.rounded(result), indent=1) + "\n")
        console.print(f"Saved to {path.relative_to(ROOT)}; python -m benchmarks.report writes the page")


if __name__ == "__main__":
    main()
