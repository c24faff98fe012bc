"""The figures that sum up the benchmarks, read from benchmarks/results/."""

import json
import statistics

from benchmarks.run import BACKENDS, RESULTS

NAMES = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
COMPILED = ("compiled", "self-compiled", "fit")
# The modes on torch: both sides eager, ours compiled, and both compiled. `fit` has names of its own for them.
ON_TORCH = {
    "eager": ("eager", "fit"),
    "replayed": ("replayed", "self-compiled", "fit, replayed"),
    "inductor": ("inductor", "fit, inductor"),
    "inductor, both": ("inductor, both", "fit, inductor, both"),
}
# Rows of the tables, and their names for people.
TASKS = {
    "gradient by weights": "gradient, weights",
    "double backward": "second derivative",
    "batch Jacobian": "batch Jacobian",
    "Hessian-vector product": "Hessian-vector product",
    "per-example gradients": "gradient of each example",
    "exact step": "training step with penalty",
    "Hessian product over a data set": "Hessian product, data set",
}
PRODUCTS = {
    "Hessian product over one gradient": "Hessian-vector product",
    "linearized Hessian product over one gradient": "each further product at the point",
    "Gauss-Newton product over one gradient": "Gauss-Newton product",
}
PENALTIES = {
    "exact step over plain step": "exact penalty",
    "finite-difference step over plain step": "finite differences",
}
GUIDE = {
    "Jacobian over the guide's code": "Jacobian",
    "batch Jacobian over the guide's code": "batch Jacobian",
    "Hessian over the guide's code": "Hessian",
}


def read(backend, what):
    return json.loads((RESULTS / f"{backend}_{what}.json").read_text())


def entries(backend, row):
    """The entries of a row of the tables, of its compiled modes where there are any.

    On torch, these are the eager modes: the others have a table of their own.
    """
    found = of_row(backend, row)
    return [e for e in found if e["mode"] in COMPILED] or [e for e in found if e["mode"] == "eager"]


def of_row(backend, row):
    """All entries of a row of the tables."""
    return [e for what in ("gradients", "curvature") for e in read(backend, what)["rows"] if e["row"] == row]


def ratio(backend, row):
    """Our time divided by the other's, the median over the models."""
    return statistics.median(e["ratio"] for e in entries(backend, row))


def compiled_on_torch():
    """The rows of the table of compiled code on torch: the time over hand-written code, the medians over the models.

    The last one has the medians over all rows of the benchmarks that have these modes.
    """
    rows = {e["row"]: None for e in read("torch", "gradients")["rows"] if e["mode"].endswith("inductor, both")}
    medians = {row: [_median_of(row, modes) for modes in ON_TORCH.values()] for row in rows}
    names = TASKS | {"gradient by inputs": "gradient, inputs"}
    yield from ((names.get(row, row), *values) for row, values in medians.items() if "over" not in row)
    compared = [values for row, values in medians.items() if "over" not in row]
    yield (
        "median of these rows",
        *(statistics.median(v for v in column if v is not None) for column in zip(*compared, strict=True)),
    )


def _median_of(row, modes):
    ratios = [e["ratio"] for e in of_row("torch", row) if e["mode"] in modes]
    return statistics.median(ratios) if ratios else None


def is_eager(backend):
    return all(e["mode"] == "eager" for e in entries(backend, "gradient by weights"))


def label(backend):
    return NAMES[backend] + (", eager" if is_eager(backend) else "")


def training(backend, task):
    """The losses after second-order training and after Adam in the same time, for each seed."""
    (found,) = (e for e in read(backend, "second_order") if e["task"] == task)
    return [(seed["second_order"], seed["adam"]) for seed in found["seeds"]]


def times_better(backend, task):
    """How many times smaller the result of second-order training is, the median over the seeds."""
    return statistics.median(adam / second_order for second_order, adam in training(backend, task))


def rounded(number):
    """Two significant digits."""
    return float(f"{number:.2g}")


def share(backend, monitor, way="plain"):
    """The cost of a measurement as a fraction of an epoch."""
    (found,) = (row for row in read(backend, "monitor_cost")["rows"] if (row["way"], row["monitor"]) == (way, monitor))
    return found["share"]


def guide_speedups():
    """How many times faster than the code of TensorFlow's guide, for each of its derivatives."""
    return {name: 1 / ratio("tensorflow", row) for row, name in GUIDE.items()}


def ten_figures():
    """The rows of the table of the page: what, and the figure of each backend."""
    for row, name in (
        ("gradient by weights", "gradient with respect to the weights"),
        ("double backward", "second derivative (double backward)"),
        ("batch Jacobian", "batch Jacobian"),
        ("Hessian-vector product", "Hessian-vector product"),
        ("exact step", "training step with an exact penalty"),
    ):
        yield f"time of a {name}, relative to hand-written code", [f"{ratio(b, row):.2f}" for b in BACKENDS]
    fastest, slowest = max(guide_speedups().values()), min(guide_speedups().values())
    yield "speed relative to the code of TensorFlow's guide", [f"{slowest:.0f} to {fastest:.0f} times", "", ""]
    for row, name, unit in (
        ("Hessian product over one gradient", "a Hessian-vector product", "gradients"),
        ("exact step over plain step", "an exact penalty in `fit`", "plain steps"),
    ):
        yield f"cost of {name}", [f"{ratio(b, row):.1f} {unit}" for b in BACKENDS]
    better = [f"{rounded(times_better(b, 'sinc')):,.0f} times smaller" for b in BACKENDS]
    yield "squared error of Levenberg-Marquardt against Adam's after the same time", better
    shares = [f"{share(b, 'BatchJacobianMonitor, 8 examples'):.0%} of an epoch" for b in BACKENDS]
    yield "cost of a measurement of `BatchJacobianMonitor`", shares
