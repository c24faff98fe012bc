"""Monitors two deep networks while they learn the digits in `fit`, one with sigmoids and one with ReLU.

With ten layers of sigmoids, the gradient nearly vanishes in the first layer, and the outputs hardly depend on the
input, so the network does not learn. With ReLU and a matching initialization, it learns.

Run `python examples/watch_training.py`, with `KERAS_BACKEND=jax` or `torch` before it for another backend. It writes
watch_training.png to out/, and files for TensorBoard in out/logs/.
"""

import argparse
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Models this small do not profit from several threads, and slow down if the cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras_gradtools as kg  # before Keras: it starts the backend that is installed

# isort: split
import keras
import numpy as np
from keras import layers

DEPTH, UNITS, BATCH_SIZE = 10, 32, 64
NETWORKS = {"sigmoid": ("sigmoid", "glorot_uniform"), "ReLU": ("relu", "he_uniform")}


def load_data():
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.data))
    return (digits.data[order] / 16).astype("float32"), digits.target[order].astype("int32")


def build_classifier(activation, initializer):
    keras.utils.set_random_seed(0)
    hidden = [
        layers.Dense(UNITS, activation, kernel_initializer=initializer, name=f"hidden_{i}") for i in range(1, DEPTH + 1)
    ]
    return keras.Sequential([keras.Input((64,)), *hidden, layers.Dense(10, name="out")])


def train(name, x, y, epochs, out):
    """Returns the history of a network, and its two monitors."""
    model = build_classifier(*NETWORKS[name])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    jacobians = kg.callbacks.BatchJacobianMonitor(x[:16])
    gradients = kg.callbacks.GradientMonitor((x[:128], y[:128]), log_dir=out / "logs" / name)
    history = model.fit(x, y, batch_size=BATCH_SIZE, epochs=epochs, verbose=0, callbacks=[jacobians, gradients])
    return history.history, jacobians, gradients


def draw(found, path):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
    for row, (name, (_, jacobians, gradients)) in zip(axes, found.items(), strict=True):
        kg.plots.plot_gradient_flow(gradients, row[0]).set_title(f"{name}: gradients by layer")
        kg.plots.plot_singular_values(jacobians, row[1]).set_title(f"{name}: Jacobians with respect to the input")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="the folder for the output")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args(arguments)

    import matplotlib
    from rich.console import Console
    from rich.table import Table

    matplotlib.use("agg")
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)

    x, y = load_data()
    found = {name: train(name, x, y, options.epochs, options.out) for name in NETWORKS}

    table = Table(title=f"{DEPTH} layers on the digits, after {options.epochs} epochs")
    for column in ("", *NETWORKS):
        table.add_column(column, justify="right" if column else "left")
    rows = {
        "accuracy": "accuracy",
        "gradient of the first layer": "gradient_norm/hidden_1",
        "gradient of the last layer": "gradient_norm/out",
        "spectral norm, mean": "jacobian_spectral_norm_mean",
        "effective rank, mean": "jacobian_effective_rank_mean",
        "update to weight ratio": "update_to_weight_ratio",
        "gradient noise scale": "gradient_noise_scale",
        "dead units": "dead_units",
    }
    for title, key in rows.items():
        # Sigmoid units cannot be dead.
        table.add_row(
            title, *(f"{history[key][-1]:.3g}" if key in history else "-" for history, _, _ in found.values())
        )
    console.print(table)

    draw(found, options.out / "watch_training.png")
    console.print(
        f"Picture: {options.out / 'watch_training.png'}. Histograms: tensorboard --logdir {options.out / 'logs'}"
    )
    return found


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error}: pip install "keras-gradtools[examples]"') from None
