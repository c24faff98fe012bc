"""The tables of a result, for the terminal and, as Markdown, for docs/benchmark_tables.md."""

from rich.table import Table

# The columns that do not hold numbers.
TEXT = ("row", "mode", "model", "what", "grows with", "")


def markdown(head, body):
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict(entry):
    target = entry["target"]
    if target is None:
        return ""
    word = "met" if entry["ratio"] <= target else "MISSED"
    return f"{word}, unsure" if entry["surely_above"] <= target < entry["surely_below"] else word


def timing_table(result):
    head = (
        "row",
        "mode",
        "model",
        "batch",
        "native ms",
        "ours ms",
        "ratio",
        "quartiles",
        "CPU ratio",
        "pairs",
        "error",
        "target",
        "",
    )
    body = [
        (
            e["row"],
            e["mode"],
            e["model"],
            str(e["batch"]),
            f"{e['theirs_ms']:.2f}",
            f"{e['ours_ms']:.2f}",
            f"{e['ratio']:.3f}",
            f"{e['low']:.3f} to {e['high']:.3f}",
            f"{e['cpu_ratio']:.3f}",
            str(e["pairs"]),
            # Older results were saved without errors.
            "" if e.get("error") is None else f"{e['error']:.0e}",
            "" if e["target"] is None else f"{e['target']:.3g}",
            verdict(e),
        )
        for e in result["rows"]
    ]
    return head, body


def memory_table(result):
    head = ("row", "mode", "model", "batch", "native MiB", "ours MiB", "ratio")
    body = [
        (
            e["row"],
            e["mode"],
            e["model"],
            str(e["batch"]),
            f"{e['theirs_mib']:.1f}",
            f"{e['ours_mib']:.1f}",
            "" if e["ratio"] is None else f"{e['ratio']:.2f}",
        )
        for e in result["rows"]
    ]
    return head, body


def overhead_table(result):
    head = ("what", "native µs", "ours µs", "difference µs")
    body = [
        (e["what"], f"{e['theirs_us']:.1f}", f"{e['ours_us']:.1f}", f"{e['ours_us'] - e['theirs_us']:.1f}")
        for e in result["overheads"]
    ]
    return head, body


def growth_table(result):
    head = ("what", "examples", "outputs", "width", "outputs at once", "ms", "MiB")
    body = [
        (
            e["what"],
            str(e["n"]),
            str(e["outputs"]),
            str(e["width"]),
            "all" if e["chunk_size"] is None else str(e["chunk_size"]),
            f"{e['ms']:.1f}",
            f"{e['mib']:.1f}",
        )
        for e in result["growth"]
    ]
    return head, body


def exponent_table(result):
    names = {"n": "examples"}
    head = ("what", "grows with", "exponent of time", "exponent of memory")
    body = [
        (e["what"], names.get(e["grows"], e["grows"]), f"{e['time']:.2f}", f"{e['memory']:.2f}")
        for e in result["exponents"]
    ]
    return head, body


def tables(result):
    """Yields the caption, head and body of each table of a result."""
    if result["rows"] and "ours_mib" in result["rows"][0]:
        yield "peak memory in addition to the memory at the start", *memory_table(result)
    elif result["rows"]:
        yield "time of our code relative to hand-written code", *timing_table(result)
    if "overheads" in result:
        yield "fixed cost of a tape", *overhead_table(result)
    if "growth" in result:
        yield "time and peak memory of a Jacobian", *growth_table(result)
        yield "best-fit exponents: 1 is linear growth, 2 is quadratic", *exponent_table(result)


def conditions(result):
    """One line with the machine, the versions and the threads that the numbers were measured with."""
    versions = ", ".join(f"{name} {version}" for name, version in result["machine"]["versions"].items())
    line = f"{result['machine']['cpu']}; {versions}; {result['machine']['threads']}"
    used = [e["cpus"] for e in result["rows"] if "cpus" in e]
    return f"{line}; at most {max(used):.2f} processors busy during a row" if used else line


def show(console, result):
    for caption, head, body in tables(result):
        table = Table(title=f"{result['backend']}: {caption}")
        for column in head:
            table.add_column(column, justify="left" if column in TEXT else "right")
        for line in body:
            table.add_row(*line)
        console.print(table)
    console.print(conditions(result), highlight=False)
