"""The curvature of a classifier on one device or on several, and the differences between the two.

    python examples/distributed_curvature.py --out one.npz
    python examples/distributed_curvature.py --devices 2 --compare one.npz

Set `KERAS_BACKEND=jax` or `torch` for another backend. The function `measure` is the same for all backends, and
examples/distributed.py has the function of each backend that distributes it. The devices are simulated on the CPU, so
the script runs everywhere.
"""

import argparse
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# The devices share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras_gradtools as kg  # before Keras: it starts the backend that is installed

# isort: split
import keras
import numpy as np
from keras import layers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from distributed import LAUNCHERS

# The last batch is smaller and cannot be split evenly.
EXAMPLES, BATCH_SIZE = 203, 64


def load_data():
    """Digits in a fixed order, labels, and sample weights."""
    from sklearn.datasets import load_digits

    digits, rng = load_digits(), np.random.default_rng(0)
    order = rng.permutation(len(digits.data))[:EXAMPLES]
    weights = rng.uniform(0.2, 2.0, EXAMPLES)
    return (digits.data[order] / 16).astype("float32"), digits.target[order].astype("int32"), weights.astype("float32")


def build_model():
    """A small classifier with a regularizer, with the same weights on every backend."""
    l2 = keras.regularizers.L2(1e-3)
    parts = [keras.Input((64,)), layers.Dense(12, "tanh", kernel_regularizer=l2), layers.Dense(10)]
    model, rng = keras.Sequential(parts), np.random.default_rng(1)
    model.set_weights([0.3 * rng.normal(size=v.shape) for v in model.trainable_variables])
    return model


def measure(devices):
    """Loss, gradient, products and an eigenvalue of each operator."""
    data = tuple(devices.share(array) for array in load_data())
    model = build_model()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    results = {}
    for operator in (kg.curvature.Hessian, kg.curvature.GaussNewton, kg.curvature.Fisher):
        # The batch over all processes has the same examples for any number of processes.
        matrix = operator(model, loss, data, batch_size=BATCH_SIZE // devices.processes, verbose=0)
        columns = np.random.default_rng(2).normal(size=(matrix.shape[0], 3)).astype("float32")
        name = operator.__name__
        results[f"{name}/loss"] = np.array(matrix.loss())
        results[f"{name}/gradient"] = matrix.gradient()
        results[f"{name}/product"] = matrix @ columns[:, 0]
        results[f"{name}/products"] = matrix @ columns
        results[f"{name}/largest eigenvalue"] = matrix.eigsh(k=1)[0]
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, help="where to save the results, a .npz file")
    parser.add_argument("--compare", type=pathlib.Path, help="a saved file to compare the results with")
    options = parser.parse_args()
    options.arguments, options.script = sys.argv[1:], __file__

    def work(devices):
        results = measure(devices)
        if devices.rank:
            return
        if options.out:
            np.savez(options.out, **results)
        for name, values in results.items():
            print(f"{name}: {np.linalg.norm(values):.5g}", end="")
            if options.compare:
                expected = np.load(options.compare)[name]
                difference = np.abs(values - expected).max() / np.abs(expected).max()
                print(f", differs from {options.compare} by at most {difference:.0e} of the largest entry", end="")
            print()

    LAUNCHERS[keras.config.backend()](options, work)


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error}: pip install "keras-gradtools[examples]"') from None
