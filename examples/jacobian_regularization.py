"""Trains a digit classifier plainly, and with a penalty on its Jacobian, estimated and exact.

Source: Hoffman, Roberts & Yaida, "Robust learning with Jacobian regularization" (arXiv:1908.02729). Its loss is
L + lambda / 2 times the mean squared norm of the Jacobian of the logits. Here, lambda / 2 is called `weight`.

Run `python examples/jacobian_regularization.py`, with `KERAS_BACKEND=jax` or `torch` before it for another backend. It
writes its plot to out/.
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

LAMBDA = 0.1
BATCH_SIZE = 64
NOISES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
ATTACKS = (0.0, 0.25, 0.5, 0.75, 1.0)
NAMES = ("plain", "one projection", "exact")
COLORS = ("tab:red", "tab:blue", "tab:green")


def load_data():
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = (digits.images[..., None] / 16).astype("float32"), digits.target.astype("int32")
    order = np.random.default_rng(0).permutation(len(x))
    # Only whole batches, because a smaller last batch would need its own compilation.
    train, test = order[: 20 * BATCH_SIZE], order[-500:]
    return (x[train], y[train]), (x[test], y[test])


def build_classifier():
    # A smooth activation, because with ReLU the training gradient of the Jacobian would miss the moving kinks. No
    # convolutions, so that the ten backward passes of the exact Jacobian take only seconds.
    hidden = [layers.Dense(128, activation="silu") for _ in range(2)]
    return keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), *hidden, layers.Dense(10)])


def build_models():
    """Three models with the same initial weights."""
    plain, projected, exact = (build_classifier() for _ in NAMES)
    for model in (projected, exact):
        model.set_weights(plain.get_weights())
    options = {"weight": LAMBDA / 2, "target": "outputs"}
    return (
        plain,
        # One random direction for each image and step: unbiased, at the cost of one backward pass instead of ten.
        kg.models.InputGradientRegularized(projected, method="random_projection", projections=1, seed=0, **options),
        kg.models.InputGradientRegularized(exact, method="exact", **options),
    )


def train(model, x, y, epochs):
    """Returns the seconds per epoch, without the first epoch, in which the step is compiled."""
    keras.utils.set_random_seed(0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(2e-3), loss, metrics=["accuracy"])
    model.fit(x, y, batch_size=BATCH_SIZE, epochs=1, verbose=0)
    start = time.perf_counter()
    model.fit(x, y, batch_size=BATCH_SIZE, epochs=epochs - 1, verbose=0)
    return (time.perf_counter() - start) / (epochs - 1)


def accuracy(model, x, y):
    return float(np.mean(model.predict(x, batch_size=len(x), verbose=0).argmax(axis=1) == y))


def noisy(x, deviation):
    return x + np.random.default_rng(1).normal(0.0, deviation, x.shape).astype("float32")


def attacked(model, x, y, radius, steps):
    return kg.attacks.pgd(
        model, x, y, radius, norm=2, loss="cross_entropy", steps=steps, seed=0, batch_size=len(x), verbose=0
    )


def jacobian_norm(model, x):
    """The square root of the penalty, which is the mean squared norm of the Jacobian of the logits."""
    jacobians = ops.convert_to_numpy(kg.batch_jacobian(model)(ops.convert_to_tensor(x)))
    return float(np.sqrt(np.mean(np.sum(jacobians.reshape(len(x), -1) ** 2, axis=1))))


def evaluate(model, x, y, attack_steps):
    return {
        "noise": [accuracy(model, noisy(x, deviation), y) for deviation in NOISES],
        "attack": [accuracy(model, attacked(model, x, y, radius, attack_steps), y) for radius in ATTACKS],
        "jacobian": jacobian_norm(model, x),
    }


def plane_through(images, points):
    """The plane through three images: a grid of images on it, their coordinates, and those of the three images."""
    origin, *others = images.reshape(3, -1).astype("float64")
    # Orthonormal, so that distances in the plot are distances between images.
    basis, corners = np.linalg.qr(np.stack([other - origin for other in others], axis=1))
    corners = np.concatenate([np.zeros((2, 1)), corners], axis=1).T
    center, half = corners.mean(axis=0), 0.85 * np.ptp(corners, axis=0).max()
    ticks = np.linspace(-half, half, points)
    u, v = np.meshgrid(center[0] + ticks, center[1] + ticks)
    on_plane = origin + u[..., None] * basis[:, 0] + v[..., None] * basis[:, 1]
    return on_plane.reshape(-1, *images.shape[1:]).astype("float32"), (u, v), corners


def margin(model, grid, coordinates, corner, label):
    """The distance in the plane from one of the three images to the nearest point with another prediction."""
    wrong = model.predict(grid, batch_size=4096, verbose=0).argmax(axis=1).reshape(coordinates[0].shape) != label
    distance = np.hypot(coordinates[0] - corner[0], coordinates[1] - corner[1])
    return float(distance[wrong].min(initial=distance.max()))


def draw_cells(model, images, labels, points, ax):
    """Colors each point of the plane by the predicted digit, darker for higher probability."""
    from matplotlib import colors, pyplot

    grid, (u, v), corners = plane_through(images, points)
    logits = model.predict(grid, batch_size=4096, verbose=0).reshape(points, points, 10)
    sureness = np.exp(logits - logits.max(axis=-1, keepdims=True))
    sureness = 1.0 / sureness.sum(axis=-1)
    palette = np.array([colors.to_rgb(c) for c in pyplot.get_cmap("tab10").colors])
    shade = 0.25 + 0.75 * ((sureness - 0.1) / 0.9)[..., None]
    read = logits.argmax(axis=-1)
    ax.imshow(1.0 - shade * (1.0 - palette[read]), extent=(u.min(), u.max(), v.min(), v.max()), origin="lower")
    for digit in np.unique(read):
        ax.contour(u, v, read == digit, [0.5], colors="white", linewidths=0.8)
        ax.plot([], [], "s", markersize=8, color=palette[digit], label=digit)
    ax.legend(title="read as", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    margins = [margin(model, grid, (u, v), c, label) for c, label in zip(corners, labels, strict=True)]
    for corner, image, radius in zip(corners, images, margins, strict=True):
        ax.add_patch(pyplot.Circle(corner, radius, fill=False, color="black", linewidth=1.2))
        size = 0.055 * np.ptp(u)
        inset = (corner[0] - size, corner[0] + size, corner[1] - size, corner[1] + size)
        ax.imshow(image[..., 0], cmap="Greys", extent=inset, vmin=0, vmax=1, zorder=3)
    ax.set(xlim=(u.min(), u.max()), ylim=(v.min(), v.max()), xlabel="distance in the plane")
    return margins


def draw(models, results, images, labels, points, path):
    """Returns the margins of the three images for each model in the plot."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(18, 4.7), layout="constrained")
    margins = {}
    for ax, place in ((axes[0], 0), (axes[1], 1)):
        found = draw_cells(models[place], images, labels, points, ax)
        ax.set(title=f"{NAMES[place]}: {np.mean(found):.2f} to the next cell, on average")
        margins[NAMES[place]] = found
    for ax, key, strengths, label in (
        (axes[2], "noise", NOISES, "standard deviation of the noise of a pixel"),
        (axes[3], "attack", ATTACKS, "length of the attack (l2)"),
    ):
        for name, color, result in zip(NAMES, COLORS, results, strict=True):
            shown = [100 * a for a in result[key]]
            ax.plot(strengths, shown, "--" if name == "exact" else "-", color=color, marker="o", label=name)
        ax.set(xlabel=label, ylabel="accuracy (%)", ylim=(0, 103))
        ax.grid(alpha=0.3)
        ax.legend()
    axes[2].set_title("Test digits with random noise")
    axes[3].set_title("Test digits under PGD")
    figure.suptitle("A plane through three test images, colored by the predicted digit, and the accuracy of the models")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return margins


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds instead of a minute, and worse models")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="the folder for the plot")
    options = parser.parse_args(arguments)

    import matplotlib
    from rich.console import Console
    from rich.table import Table

    matplotlib.use("agg")
    epochs, attack_steps, points = (5, 5, 60) if options.quick else (40, 20, 300)

    console = Console()
    keras.utils.set_random_seed(0)
    (x, y), (x_test, y_test) = load_data()
    models = build_models()
    console.print(f"Training on {len(x)} digits of 8 x 8 pixels, {keras.config.backend()}, from the same weights")
    seconds = [train(model, x, y, epochs) for model in models]
    results = [evaluate(model, x_test, y_test, attack_steps) for model in models]

    table = Table(title=f"{len(x_test)} test digits", title_justify="left")
    for column in ("", *NAMES):
        table.add_column(column, justify="right" if column else "left")

    def row(label, numbers, form):
        table.add_row(label, *(format(number, form) for number in numbers))

    row("clean accuracy", [r["noise"][0] for r in results], ".1%")
    for i in (2, 4):
        row(f"with noise of {NOISES[i]}", [r["noise"][i] for r in results], ".1%")
    for i in (2, 4):
        row(f"under an l2 attack of {ATTACKS[i]}", [r["attack"][i] for r in results], ".1%")
    row("norm of the Jacobian", [r["jacobian"] for r in results], ".2f")
    row("milliseconds per epoch", [1000 * s for s in seconds], ".0f")
    console.print(table)

    labels = np.array([3, 5, 8])
    right = np.all([m.predict(x_test, batch_size=500, verbose=0).argmax(axis=1) == y_test for m in models], axis=0)
    images = np.stack([x_test[np.argmax((y_test == label) & right)] for label in labels])
    options.out.mkdir(parents=True, exist_ok=True)
    margins = draw(models, results, images, labels, points, options.out / "jacobian_regularization.png")
    console.print(f"Picture: jacobian_regularization.png in {options.out}/")
    return {name: result | {"margins": margins.get(name)} for name, result in zip(NAMES, results, strict=True)}


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error}: pip install "keras-gradtools[examples]"') from None
