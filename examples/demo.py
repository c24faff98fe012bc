"""Trains a digit classifier in four ways, attacks all four, and compares them.

The four ways are plain training, training on noisy images, training on attacked images (FGSM), and training with a
penalty on the gradient of the loss with respect to the pixels.

Run `python examples/demo.py`, with `KERAS_BACKEND=jax` or `torch` before it for another backend. It writes
its plots to out/.
"""

import argparse
import os
import pathlib
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Models this small do not profit from several threads, and slow down if the cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras_gradtools as kg  # before Keras: it starts the backend that is installed

# isort: split
import keras
import numpy as np
from keras import layers, ops

BATCH_SIZE = 64
STRENGTHS = (0.05, 0.1)
CURVE = (0.0, 0.025, 0.05, 0.075, 0.1, 0.125, 0.15)
COLORS = ("tab:red", "tab:orange", "tab:green", "tab:blue")
WAYS = {
    "plain": lambda model: model,
    "noise": lambda model: kg.models.AdversarialTraining(model, kg.attacks.GaussianNoise(0.3), seed=0),
    "FGSM": lambda model: kg.models.AdversarialTraining(model, kg.attacks.FGSM(0.1)),
    # The l1 norm of the gradient is the dual norm of l-infinity attacks. ReLU has kinks, so the penalty uses finite
    # differences: see docs/penalties.md.
    "penalty": lambda model: kg.models.InputGradientRegularized(
        model, weight=0.01, norm=1, method="finite_difference", step_size=0.1
    ),
}


def load_data():
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = (digits.images[..., None] / 16).astype("float32"), digits.target.astype("int32")
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[:-500], order[-500:]
    return (x[train], y[train]), (x[test], y[test])


def build_classifier():
    convolution = {"kernel_size": 3, "padding": "same", "activation": "relu"}
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, **convolution),
            layers.Conv2D(32, strides=2, **convolution),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )


def wrapped_classifiers():
    """For each way, a classifier and the model that trains it. All classifiers have the same initial weights."""
    first = build_classifier()
    classifiers = [first, *(keras.models.clone_model(first) for _ in range(len(WAYS) - 1))]
    for classifier in classifiers:
        classifier.set_weights(first.get_weights())
    return classifiers, [way(classifier) for way, classifier in zip(WAYS.values(), classifiers, strict=True)]


class ProgressLine(keras.callbacks.Callback):
    """One progress bar for a whole `fit`."""

    def __init__(self, progress, name):
        super().__init__()
        self.progress, self.name = progress, name

    def on_train_begin(self, logs=None):
        self.bar = self.progress.add_task(self.name, total=self.params["epochs"], logs="")

    def on_epoch_end(self, epoch, logs=None):
        shown = f"accuracy {logs['accuracy']:.3f}  loss {logs['loss']:.3f}"
        self.progress.update(self.bar, advance=1, logs=shown)


def train(models, x, y, epochs, console):
    from rich.progress import BarColumn, Progress

    columns = ("{task.description:8}", BarColumn(15), "{task.completed}/{task.total}", "{task.fields[logs]}")
    steps = epochs * -(-len(x) // BATCH_SIZE)
    with Progress(*columns, console=console) as progress:
        for name, model in zip(WAYS, models, strict=True):
            rate = keras.optimizers.schedules.CosineDecay(2e-3, steps)
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
            model.fit(x, y, batch_size=BATCH_SIZE, epochs=epochs, verbose=0, callbacks=[ProgressLine(progress, name)])


def attack(model, x, y, steps):
    """The accuracy of `model` at each strength of CURVE under each attack, and its mean gradient norm."""
    metrics = kg.attacks.robustness_metrics(
        model, x, y, CURVE[1:], steps=steps, jacobian=False, batch_size=len(x), verbose=0
    )
    assert not metrics["masked_gradients"], "the gradients are masked, so accuracies under attack mean nothing"
    return {
        kind: [metrics["clean_accuracy"], *(metrics[f"{kind.lower()}_{s:g}_accuracy"] for s in CURVE[1:])]
        for kind in ("FGSM", "PGD")
    } | {"norm": metrics["gradient_norm_mean"]}


def step_times(models, x, y, repeats):
    """The median time of a training step of each model, with the models' steps interleaved."""
    times = [[] for _ in models]
    for _ in range(repeats):
        for model, taken in zip(models, times, strict=True):
            start = time.perf_counter()
            model.train_on_batch(x[:BATCH_SIZE], y[:BATCH_SIZE])
            taken.append(time.perf_counter() - start)
    return [np.median(taken) for taken in times]


def print_table(results, times, console):
    from rich.table import Table

    table = Table(title=f"500 test digits, {keras.config.backend()}", title_justify="left")
    table.add_column("trained with")
    for name in WAYS:
        table.add_column(name, justify="right")

    table.add_row("clean accuracy", *(f"{r['PGD'][0]:.1%}" for r in results))
    for strength in STRENGTHS:
        for kind in ("FGSM", "PGD"):
            at = CURVE.index(strength)
            table.add_row(f"under {kind}, {strength}", *(f"{r[kind][at]:.1%}" for r in results))
    table.add_row("input gradient, mean norm", *(f"{r['norm']:.2f}" for r in results))
    table.add_row("training step", *(f"{1000 * t:.1f} ms" for t in times))
    table.add_row("relative to a plain step", *(f"{t / times[0]:.2f}" for t in times))
    console.print(table)


def draw_robustness(results, path):
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(6.5, 4.5), layout="constrained")
    for name, color, result in zip(WAYS, COLORS, results, strict=True):
        for kind, style in (("FGSM", "--"), ("PGD", "-")):
            shown = [100 * a for a in result[kind]]
            ax.plot(CURVE, shown, style, color=color, marker="o", markersize=4, label=f"{name}, under {kind}")
    ax.set(
        title="Digits read correctly under attack",
        xlabel="strength of the attack: largest change of a pixel (0 to 1)",
        ylabel="accuracy (%)",
        ylim=(0, 103),
    )
    ax.grid(alpha=0.3)
    ax.legend(ncols=2, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_jacobians(models, x, y, path):
    """The Jacobian of the logits with respect to the pixels, for one test image of every second digit."""
    from matplotlib import pyplot

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
    for ax, name, j in zip(axes[1:], ("plain", "penalty"), jacobians, strict=True):
        kg.plots.plot_as_patches(j, ax, (2, 3), limit=limit, colorbar=False)
        ax.set(title=f"{name} (mean size of an entry: {np.abs(j).mean():.2f})", xlabel="logit of the digit", yticks=[])
    figure.colorbar(axes[-1].images[-1], ax=axes, label="d logit / d pixel", extend="both", pad=0.01)
    figure.suptitle("Batch Jacobian: how each logit depends on each pixel")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a few seconds instead of a minute or two, and worse models"
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="the folder for the plots")
    options = parser.parse_args(arguments)

    import matplotlib
    from rich.console import Console

    matplotlib.use("agg")
    epochs, attack_steps, timed_steps = (3, 3, 5) if options.quick else (30, 20, 60)

    console = Console()
    keras.utils.set_random_seed(0)
    (x, y), (x_test, y_test) = load_data()
    classifiers, models = wrapped_classifiers()

    console.print(f"Training four models on {len(x)} digits of 8 x 8 pixels, from the same initial weights")
    train(models, x, y, epochs, console)
    console.print("Attacking all four models")
    results = [attack(model, x_test, y_test, attack_steps) for model in classifiers]
    options.out.mkdir(parents=True, exist_ok=True)
    draw_robustness(results, options.out / "robustness.png")
    draw_jacobians((classifiers[0], classifiers[-1]), x_test, y_test, options.out / "batch_jacobian.png")
    print_table(results, step_times(models, x, y, timed_steps), console)
    console.print(f"Pictures: robustness.png and batch_jacobian.png in {options.out}/")


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error}: pip install "keras-gradtools[examples]"') from None
