"""Runs that are missing, one line of JSON each."""

import json
import time

from benchmarks.run import RESULTS

# Seconds of CPU time of a run, and the share of them that the first phase, Adam, takes.
SECONDS, SHARE = 15.0, 0.2
SEEDS, TUNING_SEED, TUNED_ON = {"jax": (1, 2, 3), "tensorflow": (1,), "torch": (1,)}, 10, "jax"


def path_of(backend):
    return RESULTS / f"pde_{backend}.jsonl"


def results_of(backend):
    """The runs of this length."""
    path = path_of(backend)
    found = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return [result for result in found if result["limit"] == SECONDS]


def save(backend, result):
    with path_of(backend).open("a") as file:
        file.write(json.dumps(result) + "\n")


def key_of(result):
    return result["problem"], result["method"], result["seed"], result["rate"] if result["is_tuning"] else None


def best_rate(problem):
    """The learning rate of Adam with the smallest final error on the seed for tuning."""
    tried = [r for r in results_of(TUNED_ON) if r["problem"] == problem and r["is_tuning"]]
    return min(tried, key=lambda r: r["errors"][-1])["rate"]


def complete(backend, name, seed, chosen=None):
    """Runs what is missing for one problem and seed, by all methods or the chosen ones."""
    import keras_gradtools as kg
    from benchmarks import hand_written

    hand_written.module().use_one_thread()
    with kg.double_precision():
        _complete(backend, name, seed, chosen)


def _complete(backend, name, seed, chosen):
    from benchmarks.pde import methods, networks
    from benchmarks.pde.clock import Clock
    from benchmarks.pde.problems import PROBLEMS

    problem = next(p for p in PROBLEMS if p.name == name)
    done = {key_of(r) for r in results_of(backend)}
    error = networks.Error(problem)

    def trained(method, rate, weights=None, limit=SECONDS, **records):
        model, points = networks.build(problem, seed)
        training = methods.Training(model, points, Clock(error, limit, **records), rate)
        if weights is not None:
            training.set_weights(weights)
        began = time.perf_counter()
        methods.run(method, training)
        clock = training.clock
        clock.record(training.weights()) if not clock.errors else None
        result = {
            "backend": backend, "problem": name, "method": method, "seed": seed, "rate": rate,
            "is_tuning": seed == TUNING_SEED, "limit": limit, "steps": clock.steps,
            "wall": round(time.perf_counter() - began, 1), "seconds": clock.seconds,
            "errors": [float(f"{e:.4g}") for e in clock.errors],
        }  # fmt: skip
        return result, training

    def finish(result):
        save(backend, result)
        text = f"{backend}, {name}, seed {seed}: {result['method']} ({result['rate']:g}) {result['errors'][-1]:.2e}"
        print(
            f"{text} after {result['seconds'][-1]:.1f} s, {result['steps']} steps, {result['wall']} s in all",
            flush=True,
        )

    if seed == TUNING_SEED:
        for rate in methods.RATES:
            if (name, "Adam", seed, rate) not in done:
                finish(trained("Adam", rate)[0])
        return
    rate, first = best_rate(name), None
    for method in methods.methods_on(backend):
        if (name, method, seed, None) in done or (chosen and method not in chosen):
            continue
        if method == "Adam":
            finish(trained(method, rate)[0])
            continue
        if first is None:
            found, training = trained("Adam", rate, limit=SHARE * SECONDS)
            first = training.weights(), training.clock, found["steps"]
        weights, clock, steps = first
        records = {"spent": clock.spent, "seconds": clock.seconds, "errors": clock.errors}
        result, _ = trained(method, rate, weights, **records)
        result["adam_steps"] = steps
        finish(result)
