"""The process that `run.py` starts for one backend. It measures the rows, prints the tables and saves the result."""

import argparse
import json
import os
import pathlib
import platform
import sys

import keras
from rich.console import Console
from rich.progress import Progress

from benchmarks import hand_written, memory, tables, timing
from benchmarks.cases import cases, prepare
from benchmarks.run import RESULTS, ROOT

LARGEST_BATCH = 4096


def _measure(row, mode, model_name, batch, quick):
    by_hand = hand_written.module()
    error = None
    while True:
        ours, theirs = prepare(row, mode, model_name, batch)
        # The first run compiles, and on JAX also the second.
        for _ in range(3):
            results = ours(), theirs()
            if row.check:
                error = _require_same(results[0], hand_written.comparable(results[1]), row.tolerance)
        native_ms = 1e3 * min(timing.seconds(theirs, by_hand.block)[1] for _ in range(5))
        if native_ms >= row.least_ms or not row.grow or 2 * batch > LARGEST_BATCH:
            break
        batch *= 2
    compared = timing.compare(ours, theirs, by_hand.block, **({"at_most": 5, "at_least": 5} if quick else {}))
    return {
        "row": row.name,
        "mode": mode,
        "model": model_name,
        "batch": batch,
        **{key: round(value, 4) for key, value in vars(compared).items()},
        "error": error,
        "target": row.bound(keras.backend.backend(), mode),
    }


class _Measured(dict):
    """What was measured, by the name of the case. A complete run saves each case at once, so that it can be resumed."""

    def __init__(self, path, is_whole, resume):
        self._path = path if is_whole else None
        path.parent.mkdir(exist_ok=True)
        if is_whole and not resume:
            path.unlink(missing_ok=True)
        lines = path.read_text().splitlines() if is_whole and path.exists() else []
        super().__init__(json.loads(line) for line in lines)

    def __setitem__(self, name, found):
        super().__setitem__(name, found)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps([name, found]) + "\n")


def _require_same(ours, theirs, tolerance):
    """Returns the largest relative error. Raises `AssertionError` if the results differ by more than `tolerance`."""
    ours, theirs = keras.tree.flatten(ours), keras.tree.flatten(theirs)
    largest = 0.0
    for a, b in zip(ours, theirs, strict=True):
        a, b = keras.ops.convert_to_numpy(a), keras.ops.convert_to_numpy(b)
        # The `not` makes a NaN count as a difference.
        if a.shape != b.shape or not abs(a - b).max() <= tolerance * (abs(b).max() + 1e-4):
            raise AssertionError(f"Ours and the hand-written code disagree. Received: {a} and {b}.")
        largest = max(largest, float(abs(a - b).max() / max(abs(b).max(), 1e-30)))
    return float(f"{largest:.1e}")


def _overheads(quick):
    """The time of the smallest uses of a tape, in microseconds."""
    import keras_gradtools as kg

    by_hand = hand_written.module()
    x = keras.ops.convert_to_tensor(3.0)
    repeats = 20 if quick else 200

    def empty():
        with kg.GradientTape():
            pass

    def square():
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = keras.ops.multiply(x, x)
        return tape.gradient(y, x)

    def repeated(fun):
        def run():
            for _ in range(repeats):
                result = fun()
            return result

        return run

    pairs = {
        "empty tape": (empty, by_hand.empty_tape),
        "tape, one multiply, gradient": (square, lambda: by_hand.square_gradient(x)),
    }
    result = []
    for name, (ours, theirs) in pairs.items():
        for _ in range(3):
            ours(), theirs()
        compared = timing.compare(repeated(ours), repeated(theirs), by_hand.block, for_seconds=2.0)
        in_microseconds = 1e3 / repeats
        ours_us, theirs_us = compared.ours_ms * in_microseconds, compared.theirs_ms * in_microseconds
        result.append({"what": name, "ours_us": round(ours_us, 1), "theirs_us": round(theirs_us, 1)})
    return result


def machine():
    """The machine, the threads and the versions, which are saved with every result."""
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), model)
    backend = keras.backend.backend()
    return {
        "cpu": f"{model}, {os.cpu_count()} cores",
        "system": platform.system(),
        "threads": hand_written.module().THREADS,
        "versions": {
            "python": platform.python_version(),
            "keras": keras.__version__,
            backend: sys.modules[backend].__version__,
        },
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", required=True)
    parser.add_argument("--rows", default="")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    backend = keras.backend.backend()
    hand_written.module().use_one_thread()

    console = Console()
    if not console.is_terminal:
        # In a file, rich would assume 80 columns, which are too few for the table.
        console = Console(width=170)
    # Memory is measured only for Jacobians, where it matters most, because each row takes two extra processes.
    todo = list(cases(options.part, options.rows or ("Jacobian" if options.memory else "")))
    if not todo:
        return
    what = "memory" if options.memory else options.part
    is_whole = not options.rows and not options.quick
    measured = _Measured(ROOT / "out" / f"{backend}_{what}.jsonl", is_whole, options.resume)
    result = {"backend": backend, "machine": machine(), "rows": []}
    failed = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(backend, total=len(todo))
        for row, mode, model, batch in todo:
            progress.update(task, description=f"{backend}: {row.name}, {model}, {mode}")
            name = f"{row.name}, {mode}, {model}, {batch}"
            try:
                if name not in measured:
                    if options.memory:
                        measured[name] = memory.compare(row, mode, model, batch)
                    else:
                        measured[name] = _measure(row, mode, model, batch, options.quick)
                result["rows"].append(measured[name])
            except Exception as error:
                # The other cases are measured all the same.
                console.print(f"{name} failed: {type(error).__name__}: {error}")
                failed.append(name)
            progress.advance(task)
    if options.part == "gradients" and not options.memory and not options.rows:
        result["overheads"] = _overheads(options.quick)

    tables.show(console, result)
    if failed:
        sys.exit(f"Not saved, because {len(failed)} cases failed: {'; '.join(failed)}. Continue with --resume.")
    if is_whole:
        path = RESULTS / f"{backend}_{what}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"Saved to {path.relative_to(ROOT)}; python -m benchmarks.report writes the page")


if __name__ == "__main__":
    main()
