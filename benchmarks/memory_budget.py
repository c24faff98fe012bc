"""The peak memory of Jacobians and dense Hessians with `chunk_size="auto"`, over their `memory_budget`.

Run it as `python -m benchmarks.memory_budget`. Each peak is measured in a separate process after two calls. The peak of
the same work, one row at a time, is subtracted: it holds the result and one row. TensorFlow does not give memory back,
so the first calls are measured there, with the compilation. Writes benchmarks/results/BACKEND_memory_budget.json. For
Linux only.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys

from benchmarks.run import BACKENDS, RESULTS, ROOT, environment_of

MIB = 2**20
BUDGETS = (64, 256)
TRANSFORMS = ("batch_jacobian", "hessian", "dense")


def _dense():
    from keras import Input, Sequential, layers

    return Sequential([Input((128,)), *[layers.Dense(512, "tanh") for _ in range(4)], layers.Dense(400)]), (256, 128)


def _convolutional():
    from keras import Input, Sequential, layers

    hidden = [layers.Conv2D(16, 3, padding="same", activation="gelu") for _ in range(3)]
    return Sequential([Input((32, 32, 3)), *hidden, layers.Flatten(), layers.Dense(100)]), (8, 32, 32, 3)


def _attention():
    from keras import Input, Model, layers

    x = Input((32, 32))
    y = layers.LayerNormalization()(x + layers.MultiHeadAttention(4, 16)(x, x))
    y = layers.Dense(128, "gelu")(y)
    return Model(x, layers.Dense(100)(layers.Flatten()(y))), (32, 32, 32)


def _recurrent():
    from keras import Input, Sequential, layers

    return Sequential([Input((20, 16)), layers.GRU(64, unroll=True), layers.Dense(200)]), (64, 20, 16)


MODELS = {"dense": _dense, "convolutional": _convolutional, "attention": _attention, "recurrent": _recurrent}


def case(name, transform):
    """A function of a budget that computes the Jacobian of the inputs, or the Hessian of the last bias.

    `dense` is that Hessian as a matrix of `kg.curvature.Hessian`.
    """
    import keras

    import keras_gradtools as kg

    keras.utils.set_random_seed(0)
    model, shape = MODELS[name]()
    x = keras.random.normal(shape, seed=0)
    if transform == "batch_jacobian":
        return lambda budget: kg.batch_jacobian(model, memory_budget=budget)(x)
    if transform == "dense":
        y = keras.ops.zeros((shape[0], model.output_shape[-1]))
        bias = model.trainable_variables[-1]
        operator = kg.curvature.Hessian(model, quartic, (x, y), [bias], batch_size=shape[0], verbose=0)
        return lambda budget: operator.dense(memory_budget=budget)
    fun, (*weights, bias) = kg.functionalize(model)

    def loss(bias):
        return keras.ops.mean(keras.ops.square(fun([*weights, bias], x)) ** 2)

    return lambda budget: kg.hessian(loss, memory_budget=budget)(bias)


def quartic(y, y_pred):
    """A loss with a Hessian."""
    from keras import ops

    return ops.mean((y_pred - y) ** 4, axis=-1)


def measure_here(name, transform, budget):
    """Prints the peak memory in MiB, with that of the result."""
    import keras

    from benchmarks import hand_written, memory

    by_hand = hand_written.module()
    by_hand.use_one_thread()
    run = case(name, transform)
    warm_ups = 0 if keras.backend.backend() == "tensorflow" else 2
    print(memory.peak_mib(lambda: run(budget), by_hand.block, warm_ups=warm_ups, runs=2))


def peak(backend, *of):
    environment = {**os.environ, **environment_of(backend), "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.memory_budget", "--of", *map(str, of)]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="may be repeated")
    parser.add_argument("--transform", action="append", choices=TRANSFORMS, help="may be repeated; the others are kept")
    parser.add_argument("--of", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.of is not None:
        name, transform, budget = options.of
        measure_here(name, transform, int(budget))
        return
    transforms = options.transform or TRANSFORMS
    for backend in options.backend or BACKENDS:
        path = RESULTS / f"{backend}_memory_budget.json"
        results = (
            [row for row in json.loads(path.read_text()) if row["transform"] not in transforms] if path.exists() else []
        )
        for transform, name in itertools.product(transforms, MODELS):
            least = peak(backend, name, transform, 1)
            for budget in BUDGETS:
                growth = peak(backend, name, transform, budget * MIB) - least
                row = {"backend": backend, "transform": transform, "model": name, "budget_mib": budget}
                row |= {"peak_mib": round(growth, 1), "ratio": round(growth / budget, 2)}
                results.append(row)
                print(*row.values(), flush=True)
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
