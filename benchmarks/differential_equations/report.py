"""The results, and the tables in docs/differential_equations.md."""

import json

from benchmarks import tables
from benchmarks.run import RESULTS, ROOT

EXAMPLES = {
    "poisson": "Poisson, in 2 dimensions",
    "burgers": "Burgers",
    "kdv": "Korteweg-de Vries",
    "plate": "clamped plate",
    "allen_cahn": "Allen-Cahn",
    "poisson_100d": "Poisson, in 100 dimensions",
}
TITLES = {"jax": "JAX", "torch": "torch", "tensorflow": "TensorFlow"}
PAGE = ROOT / "docs" / "differential_equations.md"
BEGIN, END = "<!-- The tables: python -m benchmarks.differential_equations -->", "<!-- End of the tables -->"
HEAD = (
    "",
    "steps of Adam, of Levenberg-Marquardt",
    "a step of Adam (ms)",
    "of Levenberg-Marquardt (ms)",
    "training until 1e-3 (s)",
    "with compilation (s)",
)


def path_of(backend):
    return RESULTS / f"{backend}_differential_equations.json"


def results_of(backend):
    """The saved results, by example."""
    path = path_of(backend)
    return json.loads(path.read_text()) if path.exists() else {}


def missing(backend):
    """The examples without a result, or whose run ended before 1e-3."""
    found = results_of(backend)
    return [name for name in EXAMPLES if not found.get(name, {}).get("is_solved")]


def save(backend, name, result):
    path_of(backend).write_text(json.dumps({**results_of(backend), name: result}, indent=1) + "\n")


def seconds(result, way):
    """The seconds of training until the error is reached, and with compilation. Way 0 is nested, way 1 in one pass."""
    training = sum(phase["steps"] * phase["ms"][way] for phase in result["phases"]) / 1e3
    return training, training + sum(phase["first_seconds"][way] for phase in result["phases"])


def row(name, result):
    phases = result["phases"]
    steps = ", ".join(str(phase["steps"]) for phase in phases)
    times = [f"{_short(phase['ms'][0])} -> {_short(phase['ms'][1])}" for phase in phases]
    if not result["is_solved"]:
        compiled = " -> ".join(_short(seconds) for seconds in phases[0]["first_seconds"])
        return EXAMPLES[name], steps, times[0], "", "", f"Adam's compilation alone: {compiled}"
    compared = zip(seconds(result, 0), seconds(result, 1), strict=True)
    in_all = [f"{_short(a)} -> {_short(b)} ({a / b:.1f} times)" for a, b in compared]
    return EXAMPLES[name], steps, *times, *in_all


def _short(number):
    return f"{number:.3g}" if number < 100 else f"{number:.0f}"


def text():
    """The tables of all backends with results."""
    parts = []
    for backend, title in TITLES.items():
        found = results_of(backend)
        if found:
            rows = [row(name, found[name]) for name in EXAMPLES if name in found]
            parts.append(f"{title}, {next(iter(found.values()))['machine']['cpu']}:\n\n{tables.markdown(HEAD, rows)}")
    return "\n\n".join(parts)


def write():
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{text()}\n\n{END}{after}")
    print(f"Written: {PAGE.relative_to(ROOT)}")
