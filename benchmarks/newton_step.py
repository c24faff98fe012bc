"""The cost of a step of `NewtonCG` on the digits of `benchmarks.second_order`: `python -m benchmarks.newton_step`.

Trains once, and notes the state of the model and of the optimizer before each step. Then takes each step from that
state, several times, and measures its CPU time and its wall-clock time. A line fitted to the steps gives the time of a
product, and of all else. `--against CHECKOUT` measures another checkout of this repository in a process of its own, in
turn with this one and from the same states. Conjugate gradients then take almost the same products in both.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

BACKENDS = ("tensorflow", "jax", "torch")
STEPS, ROUNDS, SEED = 60, 5, 1


def trainer_of(seed):
    """Returns a compiled model, its data, and the variables that a step changes."""
    import keras

    import keras_gradtools as kg
    from benchmarks import second_order

    (task,) = (t for t in second_order.tasks() if t.name == "digits")
    model, _ = second_order.models_of(task, seed)
    trainer = kg.models.SecondOrder(model)
    optimizer = kg.optimizers.NewtonCG()
    trainer.compile(optimizer, task.loss)
    optimizer.build(trainer.trainable_variables)
    data = tuple(map(keras.ops.convert_to_tensor, task.data))
    return trainer, data, [*trainer.trainable_variables, *optimizer.variables]


def write_states(path, trainer, data, variables):
    import numpy as np
    from keras import ops

    states = {}
    for step in range(STEPS):
        states |= {f"{step},{i}": np.array(ops.convert_to_numpy(v)) for i, v in enumerate(variables)}
        trainer.train_on_batch(*data)
    np.savez(path, **states)


def work(path):
    """Measures all steps for each line of the input, and prints a line of JSON."""
    import numpy as np

    trainer, data, variables = trainer_of(SEED)
    if not os.path.exists(path):
        write_states(path, trainer, data, variables)
    states = dict(np.load(path))

    def measured():
        found = []
        for step in range(STEPS):
            for i, v in enumerate(variables):
                v.assign(states[f"{step},{i}"])
            before = time.process_time(), time.perf_counter()
            trainer.train_on_batch(*data)
            after = time.process_time(), time.perf_counter()
            found.append([1e3 * (b - a) for a, b in zip(before, after, strict=True)])
            found[-1].append(trainer.last_step.iterations)
        return found

    measured()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(measured()), flush=True)


def summary(rounds):
    """The figures of one checkout, of which `rounds` has the steps of each round."""
    import numpy as np

    steps = np.median(np.array(rounds), axis=0)
    per_product, fixed = np.polyfit(steps[:, 2], steps[:, 0], 1)
    cpu, wall, products = steps.mean(axis=0)
    names = ("cpu_ms", "wall_ms", "products", "cpu_ms_per_product", "cpu_ms_of_all_else")
    return dict(zip(names, map(lambda x: round(float(x), 3), (cpu, wall, products, per_product, fixed)), strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="may be repeated")
    parser.add_argument("--against", help="another checkout")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--states", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.states:
        return work(options.states)
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    checkouts = [here, *([os.path.abspath(options.against)] if options.against else [])]
    for backend in options.backend or BACKENDS:
        measure(backend, checkouts, options.rounds)


def measure(backend, checkouts, count):
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, os.path.abspath(__file__), "--states", os.path.join(folder, "states.npz")]
        workers = []
        for checkout in checkouts:
            environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": checkout, "OMP_NUM_THREADS": "1"}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            workers.append(subprocess.Popen(command, cwd=checkout, env=environment, **pipes))
            # The first one writes the states.
            while workers[-1].stdout.readline() != "ready\n":
                if workers[-1].poll() is not None:
                    raise SystemExit(f"{checkout} cannot be measured")
        rounds = [[] for _ in workers]
        for _ in range(count):
            for worker, found in zip(workers, rounds, strict=True):
                worker.stdin.write("\n")
                worker.stdin.flush()
                found.append(json.loads(worker.stdout.readline()))
        for worker in workers:
            worker.stdin.close()
            worker.wait()
    for checkout, found in zip(checkouts, rounds, strict=True):
        print(backend, checkout, summary(found), flush=True)
    for place, name in enumerate(("CPU", "wall-clock")):
        for other in rounds[1:]:
            ratios = [total(b, place) / total(a, place) for a, b in zip(rounds[0], other, strict=True)]
            print(f"{backend}: the other takes {statistics.median(ratios):.2f} times as much {name} time", flush=True)


def total(steps, place):
    return sum(step[place] for step in steps)


if __name__ == "__main__":
    main()
