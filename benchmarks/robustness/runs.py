"""Which trainings and attacks the robustness study runs, where it keeps the results, and which settings it chooses."""

import json
import statistics
import sys

from benchmarks.robustness import methods
from benchmarks.run import BACKENDS, RESULTS

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
