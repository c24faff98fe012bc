"""Trains a digit classifier with a penalty on input gradients, on one device or on several, and compares the two.

    python examples/distributed.py --out one.npz
    python examples/distributed.py --devices 2 --compare one.npz

Set `KERAS_BACKEND=jax` or `torch` for another backend. The function `train` is the same for all backends. Below it, one
function per backend distributes it: by `keras.distribution.DataParallel` on JAX, and on torch from Keras 3.16 on; by
`DistributedDataParallel` on torch with an older Keras; by `tf.distribute.MirroredStrategy` on TensorFlow. The devices
are simulated on the CPU, so the script runs everywhere.
"""

import argparse
import gc
import os
import pathlib
import subprocess
import sys
import typing

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# The devices share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras_gradtools as kg  # before Keras: it starts the backend that is installed

# isort: split
import keras
import numpy as np
from keras import layers

STEPS = 10
BATCH_SIZE = 64


class Run(typing.NamedTuple):
    """A training run: a model, its optimizer, and the options of its penalty."""

    penalty: dict
    activation: str | None = "gelu"
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    is_convolutional: bool = True
    has_batch_normalization: bool = False
    dropout: float = 0.0
    has_sample_weights: bool = False
    is_evaluated: bool = False


EXACT = {"weight": 0.5, "method": "exact"}
FINITE_DIFFERENCE = {"weight": 0.5, "method": "finite_difference"}
FADING = keras.optimizers.schedules.PolynomialDecay(1.0, decay_steps=STEPS, end_learning_rate=0.1)

RUNS = {
    "exact": Run(EXACT),
    "finite_difference": Run(FINITE_DIFFERENCE, "relu"),
    "random_projection": Run({"weight": 0.05, "target": "outputs", "method": "random_projection", "seed": 0}),
    "every_other_step": Run(EXACT | {"every": 2}, has_sample_weights=True),
    "schedule": Run(FINITE_DIFFERENCE | {"weight": FADING}, "relu", "adam", 0.01, has_sample_weights=True),
    "batch_normalization": Run(EXACT, has_batch_normalization=True),
    "frozen_statistics": Run(FINITE_DIFFERENCE | {"frozen_statistics": True}, "relu", has_batch_normalization=True),
    "dropout": Run(FINITE_DIFFERENCE, "relu", dropout=0.25),
    "linear": Run(EXACT, None, is_convolutional=False, is_evaluated=True),
}


# --- the training, the same on any number of devices ---


class Devices:
    """One process controls all devices, and the framework splits each batch."""

    processes, rank = 1, 0

    def wrapped(self, model):
        """The model that `fit` calls."""
        return model

    def share(self, array):
        """The examples of this process: its part of every batch."""
        return array[self.rank :: self.processes]

    def mean(self, values):
        """The mean over all processes."""
        return np.asarray(values)


def load_data():
    """Digits in a fixed order, labels, and sample weights, in whole batches that can be split evenly."""
    from sklearn.datasets import load_digits

    digits, rng = load_digits(), np.random.default_rng(0)
    order = rng.permutation(len(digits.images))
    order = order[: len(order) // BATCH_SIZE * BATCH_SIZE]
    x, y = digits.images[order, ..., None] / 16, digits.target[order]
    return x.astype("float32"), y.astype("int32"), rng.uniform(0.2, 2.0, len(y)).astype("float32")


def build_model(run):
    """The classifier, with the same weights on every backend."""
    parts = [keras.Input((8, 8, 1))]
    if run.is_convolutional:
        parts.append(layers.Conv2D(8, 3, strides=2, padding="same"))
        if run.has_batch_normalization:
            # Otherwise each replica uses the statistics of its own examples. Other backends raise an error for it.
            is_tensorflow = keras.config.backend() == "tensorflow"
            parts.append(layers.BatchNormalization(synchronized=is_tensorflow))
        parts.append(layers.Activation(run.activation))
    parts += [layers.Flatten(), layers.Dropout(run.dropout, seed=0), layers.Dense(10)]
    model, rng = keras.Sequential(parts), np.random.default_rng(1)
    for variable in model.trainable_variables:
        if len(variable.shape) > 1:
            scale = np.sqrt(2 / np.prod(variable.shape[:-1]))
            variable.assign(scale * rng.normal(size=variable.shape))
    return model


def train(run, devices):
    """Loss and penalty of each step, the weights after the last step, and the results of `evaluate` with them."""
    x, y, sample_weight = (devices.share(array) for array in load_data())
    batch_size = BATCH_SIZE // devices.processes
    model = build_model(run)
    regularized = kg.models.InputGradientRegularized(devices.wrapped(model), **run.penalty)
    optimizer = keras.optimizers.get({"class_name": run.optimizer, "config": {"learning_rate": run.learning_rate}})
    regularized.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    # Each epoch is one step and continues in the data where the last one stopped, so that each step is logged.
    history = regularized.fit(
        x,
        y,
        sample_weight=sample_weight if run.has_sample_weights else None,
        batch_size=batch_size,
        steps_per_epoch=1,
        epochs=STEPS,
        shuffle=False,
        verbose=0,
    ).history
    results = {"loss": devices.mean(history["loss"]), "penalty": devices.mean(history["input_gradient_penalty"])}
    results |= {f"weights/{i}": w for i, w in enumerate(model.get_weights())}
    if run.is_evaluated:
        logs = regularized.evaluate(x, y, batch_size=batch_size, verbose=0, return_dict=True)
        results["evaluated"] = devices.mean([logs["loss"], logs["input_gradient_penalty"]])
    return results


# --- distribution on each backend ---


def on_jax(options, work):
    """All variables on each device, each batch split over them."""
    # JAX reads this when it first looks for devices.
    flag = f"--xla_force_host_platform_device_count={options.devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    if options.devices > 1:
        keras.distribution.set_distribution(keras.distribution.DataParallel())
    work(Devices())


def on_tensorflow(options, work):
    """A replica of the model on each device. The model is built and compiled in the scope of the strategy."""
    import tensorflow as tf

    if options.devices == 1:
        return work(Devices())
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * options.devices)
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(options.devices)])
    with strategy.scope():
        work(Devices())


def on_torch(options, work):
    """One process per device, started by torchrun. Without torchrun, the script starts torchrun on itself."""
    if "WORLD_SIZE" not in os.environ:
        if options.devices == 1:
            return work(Devices())
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=localhost"]
        torchrun.append(f"--nproc-per-node={options.devices}")
        sys.exit(subprocess.call([sys.executable, *torchrun, options.script, *options.arguments]))

    import torch

    torch.distributed.init_process_group("gloo")
    is_parallel_by_itself = tuple(map(int, keras.__version__.split(".")[:2])) >= (3, 16)
    if is_parallel_by_itself:
        # Each process passes its own part of the data, below.
        keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))

    class Parallel(keras.Model):
        """Calls `model` through DistributedDataParallel, which averages the gradients in `backward`."""

        def __init__(self, model):
            super().__init__()
            self.model = model
            # In a tuple, because Keras would track a torch module as another layer.
            self.parallel = (torch.nn.parallel.DistributedDataParallel(model),)
            self.built = True

        def call(self, inputs, training=None):
            return self.parallel[0](inputs, training=training)

    class Process(Devices):
        """One of several processes."""

        processes, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()

        def wrapped(self, model):
            return model if is_parallel_by_itself else Parallel(model)

        def mean(self, values):
            total = torch.tensor(values)
            torch.distributed.all_reduce(total)
            return total.numpy() / self.processes

    options.devices = Process.processes
    work(Process())
    # The models reference the group, in cycles. What is left of it at exit sometimes aborts the process.
    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


LAUNCHERS = {"jax": on_jax, "tensorflow": on_tensorflow, "torch": on_torch}


# --- the command line ---


def differences(results, expected, run):
    """The largest difference for each kind of result of `run`."""
    found = {}
    for key in (key for key in results if key.startswith(f"{run}/")):
        kind = key.split("/")[1]
        found[kind] = max(found.get(kind, 0.0), np.abs(results[key] - expected[key]).max())
    return found


def report(results, options):
    expected = np.load(options.compare) if options.compare else None
    backend = keras.config.backend()
    print(f"{backend}, {options.devices} device{'s' if options.devices > 1 else ''}, {STEPS} steps")
    for run in options.runs:
        loss, penalty = results[f"{run}/loss"], results[f"{run}/penalty"]
        print(f"{run}: loss {loss[0]:.4f} -> {loss[-1]:.4f}, penalty {penalty[0]:.4f} -> {penalty[-1]:.4f}")
        if expected is not None:
            found = differences(results, expected, run)
            print(f"  largest differences: {', '.join(f'{kind} {value:.0e}' for kind, value in found.items())}")
    if options.out:
        np.savez(options.out, **results)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs", nargs="*", default=["exact", "finite_difference"], help=f"the runs, from {', '.join(RUNS)}"
    )
    parser.add_argument("--devices", type=int, default=1, help="number of devices to train on (default: 1)")
    parser.add_argument("--out", type=pathlib.Path, help="where to save the results, an .npz file")
    parser.add_argument("--compare", type=pathlib.Path, help="saved results to compare with")
    options = parser.parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else arguments
    options.script = __file__

    def work(devices):
        results = {f"{run}/{k}": v for run in options.runs for k, v in train(RUNS[run], devices).items()}
        if devices.rank == 0:
            report(results, options)

    LAUNCHERS[keras.config.backend()](options, work)


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error}: pip install "keras-gradtools[examples]"') from None
