"""Trains a digit classifier with and without input-gradient regularization, attacks both, and compares them.

Run `python examples/demo.py`, with `KERAS_BACKEND=jax` or `torch` before it for another backend. It leaves
its pictures in out/.
"""

import argparse
import os
import pathlib
import time

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Models this small gain nothing from several threads, and lose much where the cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras
import matplotlib

matplotlib.use("agg")

import numpy as np
from keras import layers, ops
from matplotlib import pyplot
from rich.console import Console
from rich.progress import BarColumn, Progress
from rich.table import Table
from sklearn.datasets import load_digits

import keras_gradtools as kg

WEIGHT = 1.0
BATCH_SIZE = 64
STRENGTHS = (0.05, 0.1)
CURVE = (0.0, 0.025, 0.05, 0.075, 0.1, 0.125, 0.15)
NAMES = ("plain", "regularized")
COLORS = ("tab:red", "tab:blue")


def load_data():
    digits = load_digits()
    x, y = (digits.images[..., None] / 16).astype("float32"), digits.target.astype("int32")
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[:-500], order[-500:]
    return (x[train], y[train]), (x[test], y[test])


def build_classifier():
    # A smooth activation: with ReLU, the exact penalty has the wrong training gradient.
    convolution = {"kernel_size": 3, "padding": "same", "activation": "gelu"}
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, **convolution),
            layers.Conv2D(32, strides=2, **convolution),
            layers.Flatten(),
            layers.Dense(64, activation="gelu"),
            layers.Dense(10),
        ]
    )


class ProgressLine(keras.callbacks.Callback):
    """One bar for a whole `fit`."""

    def __init__(self, progress, name):
        super().__init__()
        self.progress, self.name = progress, name

    def on_train_begin(self, logs=None):
        self.bar = self.progress.add_task(self.name, total=self.params["epochs"], logs="")

    def on_epoch_end(self, epoch, logs=None):
        shown = "  ".join(f"{key} {value:.3f}" for key, value in logs.items())
        self.progress.update(self.bar, advance=1, logs=shown)


def train(models, x, y, epochs, console):
    columns = ("{task.description:11}", BarColumn(15), "{task.completed}/{task.total}", "{task.fields[logs]}")
    with Progress(*columns, console=console) as progress:
        for name, model in zip(NAMES, models, strict=True):
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(keras.optimizers.Adam(2e-3), loss, metrics=["accuracy"])
            model.fit(x, y, batch_size=BATCH_SIZE, epochs=epochs, verbose=0, callbacks=[ProgressLine(progress, name)])


def loss_gradient(model):
    """The gradient of each example's loss by its pixels, compiled."""

    @kg.jit
    def gradient(x, y):
        with kg.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            loss = ops.sum(keras.losses.sparse_categorical_crossentropy(y, model(x), from_logits=True))
        return tape.gradient(loss, x)

    return gradient


def fgsm(gradient, x, y, strength):
    """The fast gradient sign method: one step of the full strength (Goodfellow et al., arXiv:1412.6572)."""
    return ops.clip(x + strength * ops.sign(gradient(x, y)), 0.0, 1.0)


def pgd(gradient, x, y, strength, steps=20):
    """Projected gradient ascent within the same cube around each image (Madry et al., arXiv:1706.06083)."""
    adversarial = x
    for _ in range(steps):
        adversarial = adversarial + 2.5 * strength / steps * ops.sign(gradient(adversarial, y))
        adversarial = ops.clip(ops.clip(adversarial, x - strength, x + strength), 0.0, 1.0)
    return adversarial


def accuracy(model, x, y):
    return float(np.mean(model.predict(ops.convert_to_numpy(x), batch_size=len(x), verbose=0).argmax(axis=1) == y))


def attack(model, x, y, steps):
    """The accuracy of `model` at each strength of CURVE under each attack, and its mean gradient norm."""
    gradient = loss_gradient(model)
    images, labels = ops.convert_to_tensor(x), ops.convert_to_tensor(y)
    norms = np.sqrt((ops.convert_to_numpy(gradient(images, labels)) ** 2).sum(axis=(1, 2, 3)))
    return {
        "FGSM": [accuracy(model, fgsm(gradient, images, labels, s), y) for s in CURVE],
        "PGD": [accuracy(model, pgd(gradient, images, labels, s, steps), y) for s in CURVE],
        "norm": norms.mean(),
    }


def step_times(models, x, y, repeats):
    """The median time of a training step of each model, their steps taking turns."""
    times = [[] for _ in models]
    for _ in range(repeats):
        for model, taken in zip(models, times, strict=True):
            start = time.perf_counter()
            model.train_on_batch(x[:BATCH_SIZE], y[:BATCH_SIZE])
            taken.append(time.perf_counter() - start)
    return [np.median(taken) for taken in times]


def print_table(results, times, console):
    table = Table(title=f"500 test digits, {keras.config.backend()}", title_justify="left")
    table.add_column("")
    for name in (*NAMES, "change"):
        table.add_column(name, justify="right")

    def percent(label, plain, robust):
        table.add_row(label, f"{plain:.1%}", f"{robust:.1%}", f"{100 * (robust - plain):+.1f} points")

    percent("clean accuracy", *(r["PGD"][0] for r in results))
    for strength in STRENGTHS:
        for name in ("FGSM", "PGD"):
            percent(f"accuracy under {name}, {strength}", *(r[name][CURVE.index(strength)] for r in results))
    for label, (plain, robust), unit in (
        ("mean norm of the input gradient", [r["norm"] for r in results], ""),
        ("training step", [1000 * t for t in times], " ms"),
    ):
        table.add_row(label, f"{plain:.2f}{unit}", f"{robust:.2f}{unit}", f"x {robust / plain:.2f}")
    console.print(table)


def draw_robustness(results, path):
    figure, ax = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, color, result in zip(NAMES, COLORS, results, strict=True):
        for kind, style in (("FGSM", "--"), ("PGD", "-")):
            shown = [100 * a for a in result[kind]]
            ax.plot(CURVE, shown, style, color=color, marker="o", markersize=4, label=f"{name}, {kind}")
    ax.set(
        title="Digits read correctly under attack",
        xlabel="strength of the attack: largest change of a pixel (0 to 1)",
        ylabel="accuracy (%)",
        ylim=(0, 103),
    )
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_jacobians(models, x, y, path):
    """How each logit depends on each pixel, for one test image of every second digit."""
    x = x[[int(np.argmax(y == digit)) for digit in range(0, 10, 2)]]

    def jacobian(model):
        images = ops.convert_to_tensor(x)
        with kg.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(images)
            logits = model(images)
        return ops.convert_to_numpy(tape.batch_jacobian(logits, images))[..., 0]

    jacobians = [jacobian(model) for model in models]
    limit = np.quantile(np.abs(jacobians), 0.998)
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4), width_ratios=(8, 89, 89), layout="constrained", sharey=True)
    kg.plots.plot_as_patches(x[..., 0][:, None], axes[0], (2, 3), cmap="Greys", colorbar=False)
    axes[0].images[-1].set_clim(0, 1)
    axes[0].set(title="image", xticks=[], yticks=[], ylabel="test digits")
    for ax, name, j in zip(axes[1:], NAMES, jacobians, strict=True):
        kg.plots.plot_as_patches(j, ax, (2, 3), limit=limit, colorbar=False)
        ax.set(title=f"{name} (mean size of an entry: {np.abs(j).mean():.2f})", xlabel="logit of the digit", yticks=[])
    figure.colorbar(axes[-1].images[-1], ax=axes, label="d logit / d pixel", extend="both", pad=0.01)
    figure.suptitle("Batch Jacobian: how each logit depends on each pixel")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds instead of a minute, and worse models")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="the folder for the pictures")
    options = parser.parse_args(arguments)
    epochs, attack_steps, timed_steps = (3, 3, 5) if options.quick else (30, 20, 60)

    console = Console()
    keras.utils.set_random_seed(0)
    (x, y), (x_test, y_test) = load_data()
    plain = build_classifier()
    shared_start = keras.models.clone_model(plain)
    shared_start.set_weights(plain.get_weights())
    regularized = kg.models.InputGradientRegularized(shared_start, weight=WEIGHT)
    models = (plain, regularized)

    console.print(f"Training on {len(x)} digits of 8 x 8 pixels, from the same initial weights")
    train(models, x, y, epochs, console)
    console.print("Attacking both")
    results = [attack(model, x_test, y_test, attack_steps) for model in models]
    options.out.mkdir(parents=True, exist_ok=True)
    draw_robustness(results, options.out / "robustness.png")
    draw_jacobians(models, x_test, y_test, options.out / "batch_jacobian.png")
    print_table(results, step_times(models, x, y, timed_steps), console)
    console.print(f"Pictures: robustness.png and batch_jacobian.png in {options.out}/")


if __name__ == "__main__":
    main()
