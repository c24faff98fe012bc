"""A Newton step on the last layer at the end of each epoch, while Adam trains all layers in `fit`.

The loss of a classifier is convex in the weights of its last layer, which are few. Newton's method finds their optimum
for fixed earlier layers in a step or two. A digit classifier is trained with and without `kg.callbacks.NewtonStep`,
from the same weights and on the same batches.

Run `python examples/newton_last_layer.py`, with `KERAS_BACKEND=jax` or `torch` before it for another backend. It writes
newton_last_layer.png to out/.
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

BATCH_SIZE = 128


def load_data():
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = (digits.data / 16).astype("float32"), digits.target.astype("int32")
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[:-500], order[-500:]
    return (x[train], y[train]), (x[test], y[test])


def build_classifier(seed):
    keras.utils.set_random_seed(seed)
    head = layers.Dense(10, kernel_regularizer=keras.regularizers.L2(1e-3), name="head")
    return keras.Sequential([keras.Input((64,)), layers.Dense(32, "tanh"), head])


class LossOverEpochs(keras.callbacks.Callback):
    """The loss over all training data, and the accuracy on the test data, at the end of each epoch."""

    def __init__(self, train, test):
        super().__init__()
        self.data = {"train": train, "test": test}
        self.losses, self.accuracies = [], []

    def on_epoch_end(self, epoch, logs=None):
        found = {name: self.model.evaluate(*data, batch_size=500, verbose=0) for name, data in self.data.items()}
        self.losses.append(found["train"][0])
        self.accuracies.append(found["test"][1])


def train(seed, train, test, epochs, with_newton):
    """Returns the history of `fit`, and the callback with its measurements at the end of each epoch."""
    model = build_classifier(seed)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    watch = LossOverEpochs(train, test)
    callbacks = [watch]
    if with_newton:
        # Before the other callback, so that it sees the weights after the step.
        callbacks.insert(0, kg.callbacks.NewtonStep(train, variables=model.get_layer("head"), curvature="gauss_newton"))
    history = model.fit(*train, batch_size=BATCH_SIZE, epochs=epochs, verbose=0, callbacks=callbacks, shuffle=False)
    return history.history, watch


def show(history, console):
    from rich.table import Table

    columns = {
        "step": ("newton_step_length", ".3g"),
        "damping": ("newton_damping", ".1e"),
        "ratio": ("newton_ratio", ".2f"),
        "decrease": ("newton_decrease", ".1e"),
        "iterations": ("newton_cg_iterations", "d"),
        "reason": ("newton_step_reason", "d"),
    }
    table = Table(title=f"Newton steps on the last layer, {keras.config.backend()}", title_justify="left")
    for name in ("epoch", *columns):
        table.add_column(name, justify="right")
    for epoch in range(len(history["loss"])):
        cells = [format(history[key][epoch], form) for key, form in columns.values()]
        table.add_row(str(epoch + 1), *cells)
    console.print(table)


def plot(watched, path):
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, watch in watched.items():
        epochs = np.arange(1, len(watch.losses) + 1)
        left.semilogy(epochs, watch.losses, marker=".", label=name)
        right.plot(epochs, watch.accuracies, marker=".", label=name)
    left.set(xlabel="epoch", ylabel="loss on the training data", title="Loss")
    right.set(xlabel="epoch", ylabel="accuracy on the test data", title="Accuracy")
    left.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="the folder for the plot")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    import matplotlib
    from rich.console import Console

    matplotlib.use("agg")
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)

    data, test = load_data()
    _, alone = train(options.seed, data, test, options.epochs, with_newton=False)
    history, both = train(options.seed, data, test, options.epochs, with_newton=True)
    show(history, console)
    watched = {"Adam": alone, "Adam and Newton steps": both}
    for name, watch in watched.items():
        console.print(
            f"{name}: loss {watch.losses[0]:.3f} after 1 epoch, {watch.losses[-1]:.3f} after {options.epochs}; "
            f"accuracy on the test data {watch.accuracies[-1]:.3f}"
        )
    plot(watched, options.out / "newton_last_layer.png")
    console.print(f"Picture: newton_last_layer.png in {options.out}/")
    return history, watched


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error}: pip install "keras-gradtools[examples]"') from None
