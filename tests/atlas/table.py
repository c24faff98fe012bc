"""Makes docs/support.md of the results of the atlas: `python -m tests.atlas.table`."""

import collections
import json
import pathlib
import sys
import textwrap

from tests.atlas.layer_cases import NEW_LAYERS
from tests.atlas.new_operations import ENTRIES
from tests.atlas.run import RESULTS

BACKENDS = ("tensorflow", "jax", "torch")
PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "support.md"
ORDERS = {
    1: ("tape", "jvp", "jacobian, reverse", "jacobian, forward", "batch_jacobian", "per_example_grad", "jit"),
    2: ("second by nesting", "hvp", "linearize"),
    3: ("third",),
}
# Where a difference of values does not tell what is right.
EXPLAINED = {
    (f"layers.{name}", kind): "a grey pixel has no hue: the derivative is that of the branch that Keras takes there"
    for name in ("RandomHue", "RandomSaturation", "RandomColorJitter", "RandomColorDegeneration")
    for kind in ("zeros", "ties")
} | {
    ("layers.RandomHue", "generic"): "the order of two channels changes within the steps of the differences",
    ("ops.image.hsv_to_rgb", "zeros"): "at black, the third derivative is that of the branch that Keras takes there",
}

NEW = "What is new in Keras 3.16 was tried with its nightly build:"
HEAD = """# Which operations have derivatives, and of which order

Look up the operations and layers of your model here before you start: the tables say up to which order their
derivatives are right on each backend. They list every differentiable function of `keras.ops` and every layer of
`keras.layers`. `python -m tests.atlas.run` makes the measurements, and `python -m tests.atlas.table` writes this page.

Each operation was differentiated at one or more generic points and at four special ones: zeros, equal numbers, a
single element, and no elements. All of this is in double precision. At each point, eleven ways to compute a derivative
were compared with differences of the values:

- first order: a tape, `jvp`, `jacobian` in both modes, `batch_jacobian`, `per_example_grad`, and a tape in `kg.jit`;
- second order: nested tapes, `hvp`, and `linearize`;
- third order: three nested tapes.

Layers were differentiated with respect to their inputs and their weights. The versions are Keras 3.15.1, TensorFlow
2.21, JAX 0.10.2 and torch 2.13.
{new}

| an entry | means |
| --- | --- |
| **3**, **2**, **1** | All ways are right up to this order at generic points. Orders above 3 were not tried. |
| **error** | A derivative raises an error that says what is missing. It never returns a number. |
| **NaN** | At some special point, a derivative is not a number. |
| ***wrong*** | At some point, a derivative is a wrong number. [limits.md](limits.md) describes each such case. |

At a kink, such as `relu` at 0 or the maximum of equal numbers, a derivative counts as right if it lies between the
slopes of both sides, or between the slopes at points nearby. Where a function jumps or has an infinite slope, the next
order has nothing to be compared with. Errors of the operation itself, such as a Cholesky factor of zeros, are left out.

TensorFlow, JAX and torch themselves get some derivatives wrong that are right here: see [upstream.md](upstream.md).
"""


def read(backend):
    """The results of a backend: by name, the verdicts by kind of point and check."""
    path = RESULTS / f"{backend}.jsonl"
    found: dict = collections.defaultdict(dict)
    for line in path.read_text().splitlines() if path.exists() else ():
        entry = json.loads(line)
        reason = EXPLAINED.get((entry["name"], entry["kind"]))
        found[entry["name"]][entry["kind"]] = {
            check: f"unknown: {reason}" if reason and text.startswith("wrong") else text
            for check, text in entry["found"].items()
        }
    return found


def verdict(text):
    """What a cell says, in one word."""
    return text.split(":")[0]


def summary(points):
    """One cell of the table, from the verdicts at all points of an operation on one backend."""
    if not points:
        return "not run yet"
    generic = [found for kind, found in points.items() if kind.startswith("generic") and "value" not in found]
    if not generic:
        reasons = {verdict(found["value"]) for found in points.values() if "value" in found}
        return "cannot be called" if "error" in reasons else ""
    order, ends_in_error = 0, False
    for candidate, checks in ORDERS.items():
        verdicts = {verdict(found.get(check, "error")) for found in generic for check in checks}
        if "error" in verdicts:
            ends_in_error = True
            break
        order = candidate
    everything = {verdict(text) for found in points.values() for check, text in found.items() if check != "value"}
    marks = ["error" if not order else f"{order}, then an error" if ends_in_error else str(order)]
    marks += ["NaN"] if "NaN" in everything else []
    marks += ["***wrong***"] if "wrong" in everything else []
    return ", ".join(marks)


def counts(results):
    """How many cells of each verdict."""
    found = collections.Counter(
        verdict(text) for points in results.values() for checks in points.values() for text in checks.values()
    )
    return [found[name] for name in ("right", "error", "NaN", "unknown", "wrong")]


def page():
    """The text of docs/support.md."""
    results = {backend: read(backend) for backend in BACKENDS}
    names = list(dict.fromkeys(name for found in results.values() for name in found))
    new = [f"`ops.{name}`" for name in sorted(ENTRIES)] + [f"`layers.{name}`" for name in sorted(NEW_LAYERS)]
    lines = [
        HEAD.format(new=textwrap.fill(f"{NEW} {', '.join(new)}.", 120)),
        "| | right | error | NaN | no derivative to compare with | wrong |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for backend in BACKENDS:
        lines.append(f"| {backend} | " + " | ".join(f"{n:,}" for n in counts(results[backend])) + " |")
    for title, prefix in (("Operations", "ops."), ("Layers", "layers.")):
        lines += ["", f"## {title}", "", f"| | {' | '.join(BACKENDS)} |", "| --- | --- | --- | --- |"]
        for name in sorted((n for n in names if n.startswith(prefix)), key=str.lower):
            cells = [summary(results[backend].get(name, {})) for backend in BACKENDS]
            lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += ["", "## What is not 3, and why", ""]
    reasons: dict = collections.defaultdict(lambda: collections.defaultdict(set))
    for backend in BACKENDS:
        for name, points in results[backend].items():
            for kind, found in points.items():
                for check, text in found.items():
                    if check != "value" and verdict(text) in ("error", "NaN", "wrong"):
                        reasons[f"{backend}: {text[:160]}"][name].add(kind.split(" ")[0] if "generic" in kind else kind)
    for text, where in sorted(reasons.items()):
        places = "; ".join(f"`{name}` ({', '.join(sorted(kinds))})" for name, kinds in sorted(where.items()))
        lines.append(f"- {text.replace('|', chr(92) + '|')}: {places}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    wrong = [f"{backend}: {counts(read(backend))[-1]}" for backend in BACKENDS if counts(read(backend))[-1]]
    sys.exit(f"Cells that are wrong: {', '.join(wrong)}" if wrong else 0)
