"""How the cost of a batch Jacobian grows with examples, outputs and width: `python -m benchmarks.growth`.

Measures the time and peak memory of our code for an MLP with two hidden layers. The full Jacobian of a few examples,
which is quadratic, is measured for contrast. There is one process for each backend, which takes a minute or two, and
one for each memory figure. Writes benchmarks/results/BACKEND_growth.json.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys

from benchmarks.run import BACKENDS, RESULTS, ROOT, environment_of

INPUTS, CLASSES = 32, 10
# Number of outputs at a time, for many examples.
CHUNK = 2


@dataclasses.dataclass(frozen=True)
class Point:
    """One Jacobian to measure, of `n` examples with `INPUTS` inputs each."""

    what: str
    n: int
    outputs: int = CLASSES
    width: int = 64
    chunk_size: int | None = None


# For each series, the attribute that varies, and the points.
SERIES = {
    "batch Jacobian, in chunks": (
        "n",
        [Point("batch Jacobian, in chunks", n, chunk_size=CHUNK) for n in (1000, 10000, 100000)],
    ),
    "full Jacobian": ("n", [Point("full Jacobian", n) for n in (50, 100, 200)]),
    "batch Jacobian by outputs": (
        "outputs",
        [Point("batch Jacobian by outputs", 1000, outputs=k, width=256) for k in (1, 10, 100)],
    ),
    "batch Jacobian by width": (
        "width",
        [Point("batch Jacobian by width", 1000, width=w) for w in (64, 256, 1024)],
    ),
}
# Fixed, because the cheaper mode for 1 output is not the one for 100.
MODE = "reverse"


def prepare(point):
    """Returns a function without arguments that computes the Jacobian."""
    import keras
    import numpy as np
    from keras import layers

    import keras_gradtools as kg

    hidden = [layers.Dense(point.width, activation="tanh") for _ in range(2)]
    model = keras.Sequential([layers.Input((INPUTS,)), *hidden, layers.Dense(point.outputs)])
    x = keras.ops.convert_to_tensor(np.random.default_rng(0).normal(size=(point.n, INPUTS)).astype("float32"))
    if point.what == "full Jacobian":
        transformed = kg.jacobian(lambda x: model(x), mode=MODE)
    else:
        transformed = kg.batch_jacobian(model, mode=MODE, chunk_size=point.chunk_size)
    return lambda: transformed(x)


def exponent(sizes, values):
    """The least-squares slope of log(value) over log(size): 1 is linear growth, 2 is quadratic."""
    slope, _ = statistics.linear_regression([math.log(s) for s in sizes], [math.log(v) for v in values])
    return round(slope, 2)


def _milliseconds(run, block):
    from benchmarks import timing

    for _ in range(2):
        block(run())
    return round(1e3 * statistics.median(timing.seconds(run, block)[0] for _ in range(5)), 2)


def _measure(backend, quick):
    from rich.console import Console

    from benchmarks import hand_written, measure_backend, memory, tables

    by_hand = hand_written.module()
    by_hand.use_one_thread()
    result = {"backend": backend, "machine": measure_backend.machine(), "rows": [], "growth": [], "exponents": []}
    for name, (grows, points) in SERIES.items():
        points = points[:2] if quick else points
        found = []
        for i, point in enumerate(points):
            ms = _milliseconds(prepare(point), by_hand.block)
            mib = memory.last_number("benchmarks.growth", f"--memory-of={name}:{i}")
            found.append({**dataclasses.asdict(point), "ms": ms, "mib": mib})
        sizes = [entry[grows] for entry in found]
        result["growth"] += found
        result["exponents"].append(
            {
                "what": name,
                "grows": grows,
                "time": exponent(sizes, [entry["ms"] for entry in found]),
                # Avoids log(0) if the memory is below the resolution.
                "memory": exponent(sizes, [max(entry["mib"], 0.1) for entry in found]),
            }
        )
    console = Console()
    tables.show(console if console.is_terminal else Console(width=170), result)
    if quick:
        return
    path = RESULTS / f"{backend}_growth.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"Saved to {path.relative_to(ROOT)}; python -m benchmarks.report writes the page")


def _print_memory(which):
    from benchmarks import hand_written, memory

    name, i = which.rsplit(":", 1)
    by_hand = hand_written.module()
    by_hand.use_one_thread()
    print(memory.peak_mib(prepare(SERIES[name][1][int(i)]), by_hand.block, runs=2))


def command_line(module, text, measure, print_memory):
    """The command of a module that measures series: on each backend in a process, and each peak of memory in another.

    `measure(backend, quick)` and `print_memory(which)` run in these processes.
    """
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="may be repeated")
    parser.add_argument("--quick", action="store_true", help="only two points of each series, as a test")
    # Used by the processes that this command starts.
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        return print_memory(options.memory_of)
    if options.measure:
        return measure(options.measure, options.quick)
    named = os.environ.get("KERAS_BACKEND")
    failed = []
    for backend in options.backend or ([named] if named else BACKENDS):
        command = [sys.executable, "-m", module, f"--measure={backend}", *(["--quick"] if options.quick else [])]
        if subprocess.run(command, cwd=ROOT, env=environment_of(backend), check=False).returncode:
            failed.append(backend)
    if failed:
        sys.exit(f"Failed on {', '.join(failed)}")


if __name__ == "__main__":
    command_line("benchmarks.growth", __doc__, _measure, _print_memory)
