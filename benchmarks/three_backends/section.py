"""The section of docs/benchmarks.md, written if there are results."""

import contextlib
import json
import statistics
from collections import Counter

from benchmarks import tables
from benchmarks.three_backends import table
from benchmarks.three_backends.ways import WAYS

SECTION = """## Three backends side by side

The same lines of this package run on each backend, with the same weights and data. All give the same values. A column
is a backend with one of its compilers. *Replayed* runs the recorded operations of torch one by one, and *inductor*
compiles them. The processes of the columns take turns, so that only one computes at a time."""

ON_DEVICE = """{where} Each cell has the milliseconds of a call and, in brackets, the ratio to the fastest:

{times}

What the table shows:

{readings}

Seconds of the first calls, which trace, record and compile:

{first_calls}

{reasons}Measured on {conditions}."""
WHERE = {"cpu": "**On a CPU.**", "gpu": "**On a GPU**, without TensorFloat-32."}


def text():
    """The section, with one part for each device that has been measured, or nothing."""
    parts = [_part(json.loads(table.path(d).read_text())) for d in table.DEVICES if table.path(d).exists()]
    return "\n\n".join([SECTION, *parts]) + "\n\n" if parts else ""


def _part(result):
    reasons = [f"- {reason}" for reason in table.reasons(result)]
    return ON_DEVICE.format(
        where=WHERE[result["device"]],
        times=tables.markdown(*table.times(result)),
        readings="\n".join(f"- {reading}" for reading in _readings(result)),
        first_calls=tables.markdown(*table.first_calls(result)),
        reasons="Empty cells:\n\n" + "\n".join(reasons) + "\n\n" if reasons else "",
        conditions=table.conditions(result),
    )


def _readings(result):
    """What the table says, a sentence each."""
    rows = result["rows"]
    titles = {way.name: way.title for way in WAYS}
    fastest = Counter(name for row in rows for name, cell in row["cells"].items() if cell.get("ratio") == 1)
    ranks = ", ".join(f"{titles[name]} in {count}" for name, count in fastest.most_common())
    yield f"Which column is the fastest depends on the row. Of {len(rows)} rows, the fastest is {ranks}."
    jacobians = [row for row in rows if row["work"] == "batch Jacobian" and "MLP" in row["model"]]
    hessians = [row for row in rows if row["work"] in ("Hessian of one kernel", "`kernel_hessian`")]
    for name, chosen, summed_up in (
        ("The batch Jacobian of an MLP", jacobians, _range),
        ("The Hessian of a kernel", hessians, _range),
        ("In the median over all rows, a call", rows, _median),
    ):
        if times := _over_jax(chosen, summed_up):
            yield f"{name} takes {times} times as long on torch as on JAX."
    found = {way.title: _values(rows, lambda cells, way=way: cells[way.name]["first_seconds"]) for way in WAYS}
    medians = ", ".join(f"{_median(seconds)} s ({title})" for title, seconds in found.items() if seconds)
    yield f"The first calls take {medians}, in the median. Slow first calls pay off only if a function is called often."


def _over_jax(rows, summed_up):
    """The times of both ways of torch over those of JAX, as text."""
    found = {
        "replayed": _values(rows, lambda cells: cells["torch"]["ms"] / cells["jax"]["ms"]),
        "inductor": _values(rows, lambda cells: cells["torch_inductor"]["ms"] / cells["jax"]["ms"]),
    }
    return " and ".join(f"{summed_up(values)} ({how})" for how, values in found.items() if values)


def _values(rows, of):
    """What `of` finds in the cells of the rows that have them."""
    found = []
    for row in rows:
        with contextlib.suppress(KeyError):
            found.append(of(row["cells"]))
    return found


def _range(values):
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low} to {high}"


def _median(values):
    return f"{statistics.median(values):.2g}"
