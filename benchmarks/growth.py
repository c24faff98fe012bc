"""How the batch Jacobian grows with examples, outputs and width: `python -m benchmarks.growth`.

Time and peak memory of ours alone, for an MLP of two hidden layers; with the full Jacobian of a few examples
for contrast, which is quadratic. One process for each backend, and one for each figure of memory; a minute
or two each. Writes benchmarks/results/BACKEND_growth.json.
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
# Of outputs at once, where there are many examples.
CHUNK = 2


@dataclasses.dataclass(frozen=True)
class Point:
    """One Jacobian: of `n` examples, by `INPUTS` inputs each."""

    what: str
    n: int
    outputs: int = CLASSES
    width: int = 64
    chunk_size: int | None = None


# Of each series: what changes in it, and its points.
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
# Every output by every input in reverse mode: the cheaper mode is another one for 1 output than for 100.
MODE = "reverse"


def prepare(point):
    """Returns the Jacobian as a function of nothing."""
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
    """The slope of the line through the points in logarithms, by least squares: 1 is linear, 2 quadratic."""
    slope, _ = statistics.linear_regression([math.log(s) for s in sizes], [math.log(v) for v in values])
    return round(slope, 2)


def _milliseconds(run, block):
    from benchmarks import timing

    for _ in range(2):
        block(run())
    return round(1e3 * statistics.median(timing.seconds(run, block)[0] for _ in range(5)), 2)


def _measure(backend, quick):
    from rich.console import Console

    from benchmarks import measure_backend, memory, tables

    by_hand = measure_backend.reference()
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
                # Below the kernel's pages there is nothing to fit.
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
    from benchmarks import measure_backend, memory

    name, i = which.rsplit(":", 1)
    by_hand = measure_backend.reference()
    by_hand.use_one_thread()
    print(memory.peak_mib(prepare(SERIES[name][1][int(i)]), by_hand.block, runs=2))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="may be repeated")
    parser.add_argument("--quick", action="store_true", help="two points of each, to see that it works")
    # The two kinds of process that the command starts for itself.
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        return _print_memory(options.memory_of)
    if options.measure:
        return _measure(options.measure, options.quick)
    named = os.environ.get("KERAS_BACKEND")
    failed = []
    for backend in options.backend or ([named] if named else BACKENDS):
        command = [sys.executable, "-m", "benchmarks.growth", f"--measure={backend}"]
        command += ["--quick"] if options.quick else []
        if subprocess.run(command, cwd=ROOT, env=environment_of(backend), check=False).returncode:
            failed.append(backend)
    if failed:
        sys.exit(f"Failed on {', '.join(failed)}")


if __name__ == "__main__":
    main()
