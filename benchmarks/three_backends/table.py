"""The tables of a result, for the terminal and for docs/benchmarks.md."""

from rich.table import Table

from benchmarks.run import RESULTS
from benchmarks.three_backends.ways import WAYS

DEVICES = ("cpu", "gpu")
LONGEST_REASON = 200


def path(device):
    """The file of a complete run."""
    return RESULTS / ("three_backends.json" if device == "cpu" else "three_backends_gpu.json")


def rounded(result):
    """The numbers of a result with four digits."""
    if isinstance(result, dict):
        return {key: rounded(value) for key, value in result.items()}
    if isinstance(result, list):
        return [rounded(value) for value in result]
    return float(f"{result:.4g}") if isinstance(result, float) else result


def _ways(result):
    return [way for way in WAYS if any(way.name in row["cells"] for row in result["rows"])]


def _name(row):
    return row["work"].replace("by weights", "with respect to weights"), f"{row['model']}, {row['batch']}"


def times(result):
    """The head and the rows of the table of times."""
    ways = _ways(result)
    head = ("", "model, batch", *(way.title for way in ways))
    return head, [(*_name(row), *(_time(row["cells"][way.name]) for way in ways)) for row in result["rows"]]


def _time(cell):
    return f"{_short(cell['ms'])} ({_short(cell['ratio'])})" if "ms" in cell else ""


def _short(x):
    """Two significant digits, and more of a number that is larger."""
    return f"{x:.0f}" if x >= 10 else f"{x:.1f}" if x >= 1 else f"{x:.2f}"


def first_calls(result):
    """The head and the rows of the table of the first calls."""
    ways = _ways(result)
    head = ("", "model, batch", *(way.title for way in ways))
    body = []
    for row in result["rows"]:
        cells = [row["cells"][way.name] for way in ways]
        body.append((*_name(row), *(_short(c["first_seconds"]) if "first_seconds" in c else "" for c in cells)))
    return head, body


def reasons(result):
    """Why cells are empty: a line for each way and reason, with the rows."""
    found: dict = {}
    for row in result["rows"]:
        for way in _ways(result):
            if "reason" in (cell := row["cells"][way.name]):
                reason = " ".join(cell["reason"].split())[:LONGEST_REASON].rstrip(".")
                found.setdefault((way.title, reason), []).append(f"{row['work']} ({row['model']})")
    return [f"{title}, {', '.join(rows)}: {reason}." for (title, reason), rows in found.items()]


def line(row):
    """A row on one line, printed as soon as it is measured."""
    cells = [f"{way.title} {_time(row['cells'][way.name]) or '-'}" for way in WAYS if way.name in row["cells"]]
    return f"{row['work']}, {row['model']}: {', '.join(cells)}"


def conditions(result):
    """One line with the machine, the devices and the versions."""
    workers = result["workers"].values()
    versions = {name: v for worker in workers for name, v in worker["machine"]["versions"].items()}
    used = [cell["cpus"] for row in result["rows"] for cell in row["cells"].values() if "cpus" in cell]
    parts = [next(iter(workers))["machine"]["cpu"], ", ".join(f"{name} {v}" for name, v in versions.items())]
    if result["device"] == "cpu":
        parts.append(f"one thread, at most {max(used):.2f} processors busy during a row")
    else:
        parts.append(", ".join(f"{way} on {worker['device']}" for way, worker in result["workers"].items()))
    return f"{'; '.join(parts)}; {result['seconds'] / 60:.0f} minutes in total"


def show(console, result):
    for title, (head, body) in (
        ("milliseconds of a call, and in brackets over the fastest", times(result)),
        ("seconds of the first calls", first_calls(result)),
    ):
        shown = Table(title=title)
        for i, column in enumerate(head):
            shown.add_column(column, justify="left" if i < 2 else "right")
        for cells in body:
            shown.add_row(*cells)
        console.print(shown)
    for reason in reasons(result):
        console.print(f"Empty: {reason}", highlight=False, markup=False)
    console.print(conditions(result), highlight=False, markup=False)
