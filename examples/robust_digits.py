"""Compares all robust training methods of the package on one classifier, and monitors them during training.

The methods are penalties on the input gradient (of the loss: exact and by finite differences, in two norms; of the
outputs: by random projection), noise, and training on attacked images. Run `python examples/robust_digits.py`, with
`KERAS_BACKEND=jax` or `torch` before it for another backend. It writes its plots to out/. docs/robustness.md has a
study with several seeds and these settings.
"""

import argparse
import os
import pathlib
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras_gradtools as kg  # before Keras: it starts the backend that is installed

# isort: split
import keras
import numpy as np
from keras import layers

BATCH_SIZE = 64
STRENGTH = 0.1
WATCHED = "val_pgd_0.1_accuracy"


def penalized(**options):
    return lambda model: kg.models.InputGradientRegularized(model, **options)


def attacked(attack):
    return lambda model: kg.models.AdversarialTraining(model, attack, seed=0)


# The activation, and the wrapper that trains the model. With ReLU, the exact penalty does not see how the kinks move.
METHODS = {
    "plain": ("relu", lambda model: model),
    "Gaussian noise": ("relu", attacked(kg.attacks.GaussianNoise(0.3))),
    "exact, l2": ("relu", penalized(weight=1.0, method="exact")),
    "exact, l2, gelu": ("gelu", penalized(weight=2.0, method="exact")),
    "differences, l2, h = 0.1": ("relu", penalized(weight=1.5, method="finite_difference", step_size=0.1)),
    "differences, l2, h = 0.5": ("relu", penalized(weight=0.6, method="finite_difference", step_size=0.5)),
    "differences, l1, h = 0.1": (
        "relu",
        penalized(weight=0.02, norm=1, method="finite_difference", step_size=0.1),
    ),
    "Jacobian projected, gelu": (
        "gelu",
        penalized(weight=0.1, target="outputs", method="random_projection", seed=0),
    ),
    "FGSM training": ("relu", attacked(kg.attacks.FGSM(STRENGTH))),
    "PGD training": ("relu", attacked(kg.attacks.PGD(STRENGTH, steps=7))),
}


def load_data():
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = (digits.images[..., None] / 16).astype("float32"), digits.target.astype("int32")
    order = np.random.default_rng(0).permutation(len(x))
    train, watched, test = np.split(order, [-628, -500])
    return (x[train], y[train]), (x[watched], y[watched]), (x[test], y[test])


def build_classifier(activation):
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation=activation),
            layers.Conv2D(32, 3, strides=2, padding="same", activation=activation),
            layers.Flatten(),
            layers.Dense(64, activation=activation),
            layers.Dense(10),
        ]
    )


def train(name, data, watched, epochs):
    """The trained classifier, its history, and the training time in seconds, including the monitor."""
    keras.utils.set_random_seed(0)
    activation, wrap = METHODS[name]
    model = build_classifier(activation)
    trained = wrap(model)
    steps = epochs * -(-len(data[0]) // BATCH_SIZE)
    rate = keras.optimizers.schedules.CosineDecay(2e-3, steps)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trained.compile(keras.optimizers.Adam(rate), loss)
    # After this callback, EarlyStopping(WATCHED, mode="max") or ModelCheckpoint could use its logs.
    monitor = kg.callbacks.RobustnessMonitor(watched, "5 epochs", epsilons=(STRENGTH,), steps=10, jacobian=False)
    start = time.perf_counter()
    history = trained.fit(*data, batch_size=BATCH_SIZE, epochs=epochs, verbose=0, callbacks=[monitor])
    return model, history.history, time.perf_counter() - start


def draw_histories(histories, path):
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for number, (name, history) in enumerate(histories.items()):
        shown = [100 * accuracy for accuracy in history[WATCHED]]
        epochs = 5 * np.arange(1, len(shown) + 1)
        ax.plot(epochs, shown, "o-", color=f"C{number}", markersize=4, label=name)
    ax.set(
        title=f"Accuracy under PGD of strength {STRENGTH}, while training",
        xlabel="epoch",
        ylabel="held-out digits read correctly (%)",
        ylim=(0, 102),
    )
    ax.grid(alpha=0.3)
    ax.legend(ncols=2, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few epochs, and worse models")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="the folder for the plots")
    options = parser.parse_args(arguments)

    import matplotlib
    from rich.console import Console
    from rich.table import Table

    matplotlib.use("agg")
    options.out.mkdir(parents=True, exist_ok=True)
    epochs, shown_at_most = (12, 50) if options.quick else (30, 500)

    console = Console()
    data, watched, test = load_data()
    table = Table(title=f"500 test digits, {keras.config.backend()}", title_justify="left")
    table.add_column("trained with")
    for column in ("clean", f"FGSM {STRENGTH}", f"PGD {STRENGTH}", "||g||", "seconds"):
        table.add_column(column, justify="right")
    results, histories, models = {}, {}, {}
    for name in METHODS:
        console.print(f"Training: {name}")
        models[name], histories[name], seconds = train(name, data, watched, epochs)
        metrics = kg.attacks.robustness_metrics(
            models[name], *test, (STRENGTH,), restarts=2, jacobian=False, batch_size=500, verbose=0
        )
        results[name] = metrics
        accuracies = (metrics[f"{kind}_accuracy"] for kind in ("clean", f"fgsm_{STRENGTH}", f"pgd_{STRENGTH}"))
        shown = (*(f"{a:.1%}" for a in accuracies), f"{metrics['gradient_norm_mean']:.2f}", f"{seconds:.0f}")
        table.add_row(name, *shown)
    console.print(table)
    draw_histories(histories, options.out / "robust_digits.png")

    best = max(results, key=lambda name: results[name][f"pgd_{STRENGTH}_accuracy"])
    console.print(f"The most robust under PGD: {best}")
    examples = tuple(part[:shown_at_most] for part in test)
    report = kg.attacks.robustness_report(models[best], *examples, batch_size=len(examples[0]), verbose=0)
    print(report)
    axes = kg.plots.plot_robustness(report)
    axes[0].figure.savefig(options.out / "robust_digits_distances.png", dpi=150)
    console.print(f"Pictures: robust_digits.png and robust_digits_distances.png in {options.out}/")
    return results


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error}: pip install "keras-gradtools[examples]"') from None
