"""The cost of a step of LBFGS and NewtonCG for a million weights: `python -m benchmarks.large_model`.

Takes steps in turn with gradients of the same batch, in one process for each backend and optimizer, and measures their
CPU time, which does not depend on what else the machine does. Measures the memory in another process, on Linux only.
Writes benchmarks/results/BACKEND_large_model.json after each optimizer. An optimizer that is in the file is not
measured again without `--again`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

from benchmarks.run import BACKENDS, RESULTS, ROOT, environment_of

UNITS, BATCH = (200, 800, 800, 250, 10), 256
WARM_UPS, STEPS = 3, 15
# Conjugate gradients take this many products at most, so that steps cost about the same.
PRODUCTS = 20
OPTIMIZERS = ("LBFGS", "NewtonCG")


def build(optimizer):
    """Returns `(step, gradient, trainer)`: two functions of the same batch, and the model."""
    import keras
    import numpy as np
    from keras import layers

    import keras_gradtools as kg

    keras.utils.set_random_seed(0)
    l2 = keras.regularizers.L2(1e-5)
    hidden = [layers.Dense(n, "tanh", kernel_regularizer=l2) for n in UNITS[1:-1]]
    model = keras.Sequential([layers.Input(UNITS[:1]), *hidden, layers.Dense(UNITS[-1], kernel_regularizer=l2)])
    random = np.random.default_rng(0)
    x = random.normal(size=(BATCH, UNITS[0])).astype("float32")
    y = random.integers(0, UNITS[-1], BATCH).astype("int32")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    options = {"max_iterations": PRODUCTS} if optimizer == "NewtonCG" else {}
    trainer = kg.models.SecondOrder(model)
    trainer.compile(getattr(kg.optimizers, optimizer)(**options), loss)
    hessian = kg.curvature.Hessian(model, loss, (x, y), batch_size=BATCH, verbose=0)
    return lambda: trainer.train_on_batch(x, y), hessian.gradient, trainer


def measure(optimizer):
    """Prints the times and the memory that is counted, as JSON."""
    import math

    step, gradient, trainer = build(optimizer)
    found: dict = {"step": [], "gradient": [], "evaluations": [], "products": []}
    for i in range(WARM_UPS + STEPS):
        for name, run in (("gradient", gradient), ("step", step)):
            start = time.process_time()
            run()
            if i >= WARM_UPS:
                found[name].append(time.process_time() - start)
        if i >= WARM_UPS:
            found["evaluations"].append(trainer.last_step.attempts)
            found["products"].append(trainer.last_step.iterations)
    weights = sum(math.prod(v.shape) for v in trainer.trainable_variables)
    ratios = [a / b for a, b in zip(found["step"], found["gradient"], strict=True)]
    result = {
        "weights": weights,
        "gradient_ms": round(1e3 * statistics.median(found["gradient"]), 2),
        "step_ms": round(1e3 * statistics.median(found["step"]), 2),
        "step_over_gradient": round(statistics.median(ratios), 2),
        "evaluations": statistics.mean(found["evaluations"]),
        "products": statistics.mean(found["products"]),
        "state_over_weights": round(sum(math.prod(v.shape) for v in trainer.optimizer.variables) / weights, 2),
    }
    print(json.dumps(result))


def print_memory(optimizer, of):
    from benchmarks import hand_written, memory

    step, gradient, _ = build(optimizer)
    run = step if of == "step" else gradient
    print(memory.peak_mib(run, hand_written.module().block if of == "gradient" else lambda logs: logs, runs=3))


def measured(backend, optimizer):
    """Measures in processes of their own, and returns the entry for the file."""
    command = [sys.executable, "-m", "benchmarks.large_model"]
    environment = environment_of(backend)
    options: dict = {"cwd": ROOT, "env": environment, "check": True, "capture_output": True, "text": True}
    done = subprocess.run([*command, f"--measure={optimizer}"], **options)
    result = json.loads(done.stdout.splitlines()[-1])
    # Freed memory goes back to the system at once, see `memory.last_number`.
    options["env"] = {**environment, "MALLOC_MMAP_THRESHOLD_": "65536"}
    for of in ("gradient", "step"):
        done = subprocess.run([*command, f"--measure={optimizer}", f"--memory-of={of}"], **options)
        peak = float(done.stdout.split()[-1])
        result[f"{of}_peak_over_weights"] = round(peak * 2**20 / (4 * result["weights"]), 1)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="may be repeated")
    parser.add_argument("--again", action="store_true", help="measure also what is in the file")
    # Used by the processes that this command starts.
    parser.add_argument("--measure", choices=OPTIMIZERS, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return print_memory(options.measure, options.memory_of) if options.memory_of else measure(options.measure)
    for backend in options.backend or BACKENDS:
        path = RESULTS / f"{backend}_large_model.json"
        results = json.loads(path.read_text()) if path.exists() else {}
        for optimizer in OPTIMIZERS:
            if options.again or optimizer not in results:
                results[optimizer] = measured(backend, optimizer)
                path.write_text(json.dumps(results, indent=1) + "\n")
            print(backend, optimizer, results[optimizer], flush=True)


if __name__ == "__main__":
    main()
