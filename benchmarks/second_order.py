"""Second-order training compared with Adam after the same time: `python -m benchmarks.second_order`.

There are two tasks with three seeds each. Both methods train in `fit` from the same weights, one after the other, in
one process for each backend:

- sinc: a fit of sinc(10 x) = sin(10 pi x) / (10 pi x) at 20,000 points by a 1-20-1 network with tanh, in batches of
  1,000. `LevenbergMarquardt` and Adam are compared by the mean squared error over all points.
- digits: a digits classifier, 64-32-10 with tanh, l2 of 1e-3, all data in one batch. `NewtonCG` and Adam are compared
  by the length of the gradient of the loss.

The second-order method trains with its default options for 60 epochs (sinc), or until the gradient is shorter than 2e-7
(digits). Adam then trains for the same wall-clock time, compilation excluded. An epoch of Adam has at least twenty
steps, which run in one program except on torch, where `CompiledTraining` compiles each step. Its learning rate, and
whether it decays (by a cosine, to zero at the end of that time), are chosen on three other seeds by the geometric mean
of the results. For `NewtonCG`, the products with and without its preconditioner are also counted. Writes
benchmarks/results/BACKEND_second_order.json.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

from benchmarks.run import BACKENDS, RESULTS, ROOT, environment_of

SEEDS, TUNING_SEEDS = (1, 2, 3), (10, 11, 12)
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
WARM_UP_STEPS, STEPS_AT_ONCE = 60, 20


@dataclasses.dataclass
class Task:
    name: str
    data: tuple
    build: Callable
    loss: object
    second_order: Callable
    epochs: int
    # The number of epochs after which the final result is measured.
    epochs_in_all: int
    batch_size: int
    measure: Callable
    # Training stops when the gradient is at most this long.
    gradient_norm: float = 0.0
    target: float = 100.0
    shuffle: bool = True


def tasks():
    import keras
    import numpy as np
    from keras import layers
    from sklearn.datasets import load_digits

    import keras_gradtools as kg

    x = np.linspace(-1, 1, 20_000, dtype="float32")[:, None]
    y = np.sinc(10 * x)

    def fit():
        return keras.Sequential([keras.Input((1,)), layers.Dense(20, "tanh"), layers.Dense(1)])

    def mean_squared_error(model, loss, data):
        found = model.predict(data[0], batch_size=len(data[0]), verbose=0).astype("float64")
        return float(np.mean((found - data[1]) ** 2))

    digits, labels = load_digits(return_X_y=True)
    l2 = keras.regularizers.L2(1e-3)

    def classifier():
        parts = [layers.Dense(32, "tanh", kernel_regularizer=l2), layers.Dense(10, kernel_regularizer=l2)]
        return keras.Sequential([keras.Input((64,)), *parts])

    def gradient_norm(model, loss, data):
        return float(np.linalg.norm(kg.curvature.Hessian(model, loss, data, batch_size=len(data[0])).gradient()))

    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    digits = (digits / 16).astype("float32"), labels.astype("int32")
    marquardt, newton_cg = kg.optimizers.LevenbergMarquardt, kg.optimizers.NewtonCG
    return [
        Task("sinc", (x, y), fit, keras.losses.MeanSquaredError(), marquardt, 60, 100, 1000, mean_squared_error),
        Task("digits", digits, classifier, cross_entropy, newton_cg, 120, 120, len(labels), gradient_norm, 2e-7),
    ]


class Trainer:
    """Trains one model on one task."""

    def __init__(self, task, seed, trainer, steps_per_execution=1):
        self.task, self.seed, self.trainer = task, seed, trainer
        self.steps_per_execution = steps_per_execution
        self.state = None

    def start(self, optimizer, epochs_of_warm_up, callbacks=()):
        """Compiles and warms up, and then restores the initial state."""
        import keras

        keras.utils.set_random_seed(self.seed)
        options = {} if self.steps_per_execution == 1 else {"steps_per_execution": self.steps_per_execution}
        self.trainer.compile(optimizer, self.task.loss, jit_compile="auto", **options)
        optimizer.build(self.trainer.trainable_variables)
        variables = [*self.trainer.variables, *optimizer.variables]
        before = [keras.ops.convert_to_numpy(v) for v in variables]
        self.fit(epochs_of_warm_up, callbacks)
        for v, value in zip(variables, before, strict=True):
            v.assign(value)

    def fit(self, epochs, callbacks=()):
        """Trains, and returns the seconds that this took."""
        start = time.perf_counter()
        self.trainer.fit(
            *self.task.data,
            batch_size=self.task.batch_size,
            epochs=epochs,
            verbose=0,
            callbacks=list(callbacks),
            shuffle=self.task.shuffle,
        )
        return time.perf_counter() - start


def stop_after(seconds):
    import keras

    class StopAfter(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.end, self.steps = time.perf_counter() + seconds, 0

        def on_train_batch_end(self, batch, logs=None):
            self.steps = int(self.model.optimizer.iterations)
            if time.perf_counter() >= self.end:
                self.model.stop_training = True

    return StopAfter()


def stop_at(gradient_norm):
    import keras

    class StopAt(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.products = 0

        def on_epoch_end(self, epoch, logs=None):
            # The logs are those of the last step. They count all steps if an epoch has only one.
            self.products += int(logs["cg_iterations"])
            if logs["gradient_norm"] <= gradient_norm:
                self.model.stop_training = True

    return StopAt()


def models_of(task, seed):
    """Two models with the same weights."""
    import keras

    keras.utils.set_random_seed(seed)
    first, second = task.build(), task.build()
    second.set_weights(first.get_weights())
    return first, second


def by_second_order(task, model, seed, **options):
    """Trains. Returns the seconds that `epochs` took, the results after them and at the end, steps, and products."""
    import keras_gradtools as kg

    trainer = Trainer(task, seed, kg.models.SecondOrder(model))
    stop = stop_at(task.gradient_norm)
    # Some programs are compiled only near the end, so the warm-up is a whole training.
    trainer.start(task.second_order(**options), task.epochs, [stop])
    seconds = trainer.fit(task.epochs, [stop])
    first = task.measure(model, task.loss, task.data)
    steps = int(trainer.trainer.optimizer.iterations)
    if task.epochs_in_all > task.epochs:
        trainer.fit(task.epochs_in_all - task.epochs)
    return seconds, first, task.measure(model, task.loss, task.data), steps, stop.products


def with_longer_epochs(task):
    """Repeats the batch of a task with one batch, so that not every step pays the fixed cost of an epoch."""
    import numpy as np

    if len(task.data[0]) > task.batch_size:
        return task
    data = tuple(np.concatenate([d] * STEPS_AT_ONCE) for d in task.data)
    return dataclasses.replace(task, data=data, shuffle=False)


def by_adam(task, model, seed, seconds, rate, decays):
    """Trains for the given seconds, and returns the result and the number of steps."""
    import keras

    import keras_gradtools as kg

    # Small steps are fastest with several steps in one program, which Keras does not support on torch. There, one step
    # is recorded and run again.
    is_torch = keras.backend.backend() == "torch"
    at_once = 1 if is_torch else STEPS_AT_ONCE
    repeated = with_longer_epochs(task)
    steps_per_epoch = -(-len(repeated.data[0]) // task.batch_size)
    trainer = Trainer(repeated, seed, kg.models.CompiledTraining(model) if is_torch else model, at_once)
    warm_up = max(WARM_UP_STEPS // steps_per_epoch, 2)
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, 10**6) if decays else rate)
    trainer.start(optimizer, warm_up)
    if decays:
        # The schedule needs the number of steps that fit into the time, which is measured here.
        per_step = trainer.fit(warm_up) / (warm_up * steps_per_epoch)
        trainer.start(
            keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, int(seconds / per_step))), warm_up
        )
    stop = stop_after(seconds)
    trainer.fit(10**6, [stop])
    return task.measure(model, task.loss, task.data), stop.steps


def measure(task):
    import keras
    import numpy as np

    import keras_gradtools as kg
    from keras_gradtools.backend import name

    tried: dict = {(rate, decays): [] for decays in (False, True) for rate in RATES}
    for seed in TUNING_SEEDS:
        first, second = models_of(task, seed)
        initial = second.get_weights()
        seconds, *_ = by_second_order(task, first, seed)
        for (rate, decays), results in tried.items():
            second.set_weights(initial)
            results.append(by_adam(task, second, seed, seconds, rate, decays)[0])
            print(
                f"{task.name}, seed {seed}: Adam, {rate:g}{', decaying' * decays}: {results[-1]:.2e} after "
                f"{seconds:.2f} s",
                flush=True,
            )
        keras.utils.clear_session()
    # Runs that diverged are not finite and count as the worst.
    rate, decays = min(tried, key=lambda way: np.nan_to_num(np.log(tried[way]), nan=np.inf).mean())
    found = {
        "backend": name(),
        "task": task.name,
        "method": task.second_order.__name__,
        "adam": {"learning_rate": rate, "decays": decays},
        "tuning": [{"learning_rate": r, "decays": d, "results": results} for (r, d), results in tried.items()],
        "target": task.target,
        "seeds": [],
    }
    for seed in SEEDS:
        first, second = models_of(task, seed)
        initial = first.get_weights()
        seconds, result, end, steps, products = by_second_order(task, first, seed)
        adam, adam_steps = by_adam(task, second, seed, seconds, rate, decays)
        found["seeds"].append(
            {"seed": seed, "seconds": seconds, "second_order": result, "steps": steps, "at_the_end": end}
            | {"adam": adam, "adam_steps": adam_steps}
        )
        if task.second_order is kg.optimizers.NewtonCG:
            first.set_weights(initial)
            *_, steps_alone, products_alone = by_second_order(task, first, seed, preconditioner_rank=0)
            found["seeds"][-1] |= {
                "products": products,
                "steps_without_preconditioner": steps_alone,
                "products_without_preconditioner": products_alone,
            }
        print(
            f"{task.name}, seed {seed}: {seconds:.2f} s, {found['method']} {result:.2e} in {steps} steps, Adam "
            f"{adam:.2e} in {adam_steps}: {adam / result:.3g} times; {end:.2e} after {task.epochs_in_all} epochs",
            flush=True,
        )
        keras.utils.clear_session()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=BACKENDS, help="only this backend")
    parser.add_argument("--task", choices=("sinc", "digits"), help="only this task")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.here:
        for backend in [options.backend] if options.backend else BACKENDS:
            arguments = [sys.executable, "-m", "benchmarks.second_order", "--here", "--backend", backend]
            arguments += ["--task", options.task] if options.task else []
            subprocess.run(arguments, cwd=ROOT, env=environment_of(backend), check=True)
        return
    if options.backend == "torch":
        import torch

        torch.set_num_threads(1)
    path = RESULTS / f"{os.environ['KERAS_BACKEND']}_second_order.json"
    results = {e["task"]: e for e in json.loads(path.read_text())} if path.exists() else {}
    for task in tasks():
        if options.task in (None, task.name):
            results[task.name] = measure(task)
            path.write_text(json.dumps(list(results.values()), indent=1) + "\n")
    print(f"Wrote {path.name}")


if __name__ == "__main__":
    main()
