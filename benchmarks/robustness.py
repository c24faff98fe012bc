"""How robust each training method makes a classifier: `python -m benchmarks.robustness`.

The data are digits of 8 x 8 pixels, with a fixed split and 500 test images. The model is a convolutional network (32
and 64 filters, dense 64), trained by `fit` with Adam and cosine decay for 60 epochs. Every image is attacked by PGD (40
steps, 2 restarts, on the cross-entropy and on the margin), with l-infinity strengths from 0.05 to 0.2.

    --choose    run this first: chooses the setting of each method on 297 of the training images, with two seeds. It is
                the one with the best accuracy under attack among those that lose at most 0.5 points of clean accuracy
    (nothing)   trains and attacks with the chosen settings: all methods with five seeds on JAX, and plain, exact and
                two finite-difference methods with three seeds on the other two backends
    --times     measures a training step of each method against a plain step, in pairs
    --report    writes the tables and the plot of docs/robustness.md

Each run is saved at once as one line of JSON in benchmarks/results/. Saved runs are not repeated.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

from benchmarks import robustness_methods as methods
from benchmarks.run import BACKENDS, RESULTS, ROOT, environment_of

ALL_ON = "jax"
SEEDS = {backend: range(5 if backend == ALL_ON else 3) for backend in BACKENDS}
CHOICE_SEEDS = (100, 101)
CHOICES = RESULTS / "robustness_choices.jsonl"
MOST_CLEAN_LOST = 0.005
EVERYWHERE = (
    "plain",
    "plain, gelu",
    "plain, softplus",
    "exact, l2 squared, relu",
    "exact, l2 squared, gelu",
    "exact, l2 squared, softplus",
    "finite differences, l2 squared, h = 0.1",
    "finite differences, l1 squared, h = 0.1",
)


def results_of(backend):
    return RESULTS / f"robustness_{backend}.jsonl"


def kept(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def is_same(record, method, seed):
    return (record["method"], record["settings"], record["seed"]) == (method.name, method.settings, seed)


def complete(path, wanted, **options):
    """Runs each pair of a method and a seed that is missing in `path`, and appends the result."""
    for number, (method, seed) in enumerate(wanted, 1):
        if any(is_same(record, method, seed) for record in kept(path)):
            continue
        record = methods.run(method, seed, **options)
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        attacked = record["pgd"][-1 if "held_out" in options else methods.STRENGTHS.index(methods.STRENGTH)]
        print(
            f"{number}/{len(wanted)} {method.name} {method.options or ''}, seed {seed}: clean {record['clean']:.1%}, "
            f"under PGD {attacked:.1%}, {record['train_seconds']:.0f} s",
            flush=True,
        )


def choose():
    wanted = [(method, seed) for seed in CHOICE_SEEDS for settings in methods.SETTINGS.values() for method in settings]
    complete(CHOICES, wanted, held_out=True, strengths=(methods.STRENGTH,))


def mean_of(records, method, key):
    found = [record[key] for record in records if any(is_same(record, method, seed) for seed in CHOICE_SEEDS)]
    if len(found) < len(CHOICE_SEEDS):
        sys.exit(f"No choice for {method.name!r} yet: run python -m benchmarks.robustness --choose first.")
    return statistics.mean(value if key == "clean" else value[0] for value in found)


def chosen():
    """For each name, the method with the setting that was best on the held-out images."""
    records = kept(CHOICES)
    (plain,) = methods.SETTINGS["plain"]
    least = mean_of(records, plain, "clean") - MOST_CLEAN_LOST

    def rank(method):
        clean = mean_of(records, method, "clean")
        return clean >= least, mean_of(records, method, "pgd"), clean

    return {name: max(settings, key=rank) for name, settings in methods.SETTINGS.items()}


def wanted_on(backend):
    found = chosen()
    here = [method for name, method in found.items() if backend == ALL_ON or name in EVERYWHERE]
    return [(method, seed) for seed in SEEDS[backend] for method in here]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="may be repeated; all three by default")
    task = parser.add_mutually_exclusive_group()
    for name in ("choose", "times", "report"):
        task.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args()
    if options.report:
        from benchmarks import robustness_report

        robustness_report.write()
        return
    backends = [ALL_ON] if options.choose else options.backend or BACKENDS
    if [os.environ.get("KERAS_BACKEND")] != list(backends):
        flag = [f"--{name}" for name in ("choose", "times") if getattr(options, name)]
        for backend in backends:
            command = [sys.executable, "-m", "benchmarks.robustness", "--backend", backend, *flag]
            subprocess.run(command, cwd=ROOT, env=environment_of(backend), check=True)
    elif options.choose:
        choose()
    elif options.times:
        from benchmarks import robustness_times

        robustness_times.measure(list(chosen().values()))
    else:
        complete(results_of(backends[0]), wanted_on(backends[0]))


if __name__ == "__main__":
    main()
