"""How Laplacians and higher derivatives grow with axes and order: `python -m benchmarks.differential_operators`.

For a tanh network with three layers of 64 units: time, in evaluations of the network that are timed in turns with it,
and peak memory, for the two largest sizes. Times are those of the processor, which other load disturbs less. There is
one process for the times of each backend, and one for each memory figure. Writes
benchmarks/results/BACKEND_differential_operators.json.
"""

import dataclasses
import json
import statistics

from benchmarks.growth import command_line, exponent
from benchmarks.run import BACKENDS, RESULTS, ROOT

EXAMPLES, SAMPLES = 128, 16
AXES, MANY_AXES, ORDERS = (10, 100, 1000), (1000, 10_000, 100_000), (1, 2, 4, 8)
PAIRS = 7
# TensorFlow keeps the memory of a program between calls, so that the figures are too small.
KEEPS_MEMORY = ("tensorflow",)


@dataclasses.dataclass(frozen=True)
class Series:
    """A quantity, what it grows with, the sizes, and a function that makes its computation from a model and a size."""

    what: str
    grows: str
    sizes: tuple
    make: object

    @property
    def dimensions(self):
        """The number of inputs of the network, for each size."""
        return self.sizes if self.grows == "axes" else (2,) * len(self.sizes)


def _laplacian(model, size, **options):
    import keras_gradtools as kg

    return kg.laplacian(model, **options)


def _pure_derivative(model, size):
    import keras_gradtools as kg

    pure = kg.partial_derivatives(model, [(0,) * size])
    return lambda x: pure(x)[0]


def _nested_derivative(model, size):
    from keras import ops

    import keras_gradtools as kg

    def along(fun):
        unit = ops.convert_to_tensor([[1.0, 0.0]])
        return lambda x: kg.jvp(fun, (x,), (ops.broadcast_to(unit, ops.shape(x)),))[1]

    fun = lambda x: model(x)  # noqa: E731
    for _ in range(size):
        fun = along(fun)
    return kg.jit(fun)


SERIES = (
    Series("Laplacian", "axes", AXES, _laplacian),
    Series("Laplacian, all axes at once", "axes", AXES, lambda m, n: _laplacian(m, n, chunk_size=None)),
    Series(
        f"Laplacian, {SAMPLES} random directions",
        "axes",
        MANY_AXES,
        lambda m, n: _laplacian(m, n, samples=SAMPLES, seed=0),
    ),
    Series("derivative of order K", "order", ORDERS, _pure_derivative),
    Series("the same by nested jvp", "order", (1, 2, 3, 4), _nested_derivative),
)


def prepared(series, size, dimensions):
    """The evaluation of the network, and the computation of the series, as functions without arguments."""
    import keras
    import numpy as np

    import keras_gradtools as kg

    hidden = [keras.layers.Dense(64, "tanh") for _ in range(3)]
    model = keras.Sequential([keras.Input((dimensions,)), *hidden, keras.layers.Dense(1)])
    points = np.random.default_rng(0).normal(size=(EXAMPLES, dimensions)).astype("float32") / dimensions**0.5
    x, value, derivative = keras.ops.convert_to_tensor(points), kg.jit(lambda x: model(x)), series.make(model, size)
    return lambda: value(x), lambda: derivative(x)


def _times(value, derivative, block):
    """The median milliseconds of both, and the median of the ratios."""
    from benchmarks import timing

    for run in (value, derivative) * 3:
        block(run())
    # An evaluation is far shorter, so that several are timed for each derivative.
    pairs = [
        (statistics.median(timing.seconds(value, block)[1] for _ in range(5)), timing.seconds(derivative, block)[1])
        for _ in range(PAIRS)
    ]
    return (
        round(1e3 * statistics.median(a for a, _ in pairs), 4),
        round(1e3 * statistics.median(b for _, b in pairs), 4),
        round(statistics.median(b / a for a, b in pairs), 2),
    )


def _measure(backend, quick):
    from benchmarks import hand_written, measure_backend, memory

    by_hand = hand_written.module()
    by_hand.use_one_thread()
    result = {"backend": backend, "machine": measure_backend.machine(), "series": []}
    for number, series in enumerate(SERIES):
        sizes = _sizes(series, quick)
        mib = [memory.last_number("benchmarks.differential_operators", f"--memory-of={number}:{n}") for n in sizes[-2:]]
        entry = {"what": series.what, "grows": series.grows, "sizes": list(sizes), "mib": mib}
        found = [
            _times(*prepared(series, size, dimensions), by_hand.block)
            for size, dimensions in zip(sizes, series.dimensions, strict=False)
        ]
        entry["evaluation_ms"], entry["ms"], entry["evaluations"] = (
            list(column) for column in zip(*found, strict=True)
        )
        entry["time_exponent"] = exponent(sizes, entry["evaluations"])
        # Avoids log(0) where the memory is below the resolution.
        entry["memory_exponent"] = exponent(sizes[-2:], [max(m, 0.1) for m in mib])
        result["series"].append(entry)
        print(json.dumps(entry), flush=True)
    if not quick:
        path = RESULTS / f"{backend}_differential_operators.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"Saved to {path.relative_to(ROOT)}; python -m benchmarks.report writes the page")


def _sizes(series, quick):
    return series.sizes[:2] if quick else series.sizes


def _print_memory(which):
    from benchmarks import hand_written, memory

    number, size = map(int, which.split(":"))
    by_hand = hand_written.module()
    by_hand.use_one_thread()
    series = SERIES[number]
    dimensions = dict(zip(series.sizes, series.dimensions, strict=True))[size]
    print(memory.peak_mib(prepared(series, size, dimensions)[1], by_hand.block, warm_ups=2, runs=2))


def table():
    """The head and the rows of the table of all saved results."""
    head = (
        "",
        "grows with",
        "time, in evaluations of the network",
        "exponent of time",
        "MiB at the largest",
        "exponent of memory",
    )
    body = []
    for backend in BACKENDS:
        path = RESULTS / f"{backend}_differential_operators.json"
        for e in json.loads(path.read_text())["series"] if path.exists() else ():
            sizes = f"{e['grows']}, {e['sizes'][0]:,} to {e['sizes'][-1]:,}"
            times = f"{e['evaluations'][0]:.1f} to {e['evaluations'][-1]:.1f}"
            mib = f"{e['mib'][-1]:.1f}"
            memory = ("", "") if backend in KEEPS_MEMORY else (mib, f"{e['memory_exponent']:.2f}")
            body.append((f"{backend}: {e['what']}", sizes, times, f"{e['time_exponent']:.2f}", *memory))
    return head, body


if __name__ == "__main__":
    command_line("benchmarks.differential_operators", __doc__, _measure, _print_memory)
