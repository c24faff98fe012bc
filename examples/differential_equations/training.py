"""What the examples of differential equations share: the network, the training, the options and the picture.

An equation is a Keras model whose output is its residual. `fit` trains it towards zero at some points, first by Adam,
and then by the Levenberg-Marquardt method.
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
from keras import layers


def network(x, units=16, depth=3):
    """A network of smooth layers: it has all derivatives."""
    for _ in range(depth):
        x = layers.Dense(units, "tanh")(x)
    return layers.Dense(1)(x)


class Watch(keras.callbacks.Callback):
    """The relative error of u after each epoch, and the seconds of training until then, compilation included."""

    def __init__(self, u, points, exact):
        super().__init__()
        self.u, self.points, self.exact = u, points, exact
        self.seconds, self.errors = [0.0], [self.error()]

    def error(self):
        found = self.u.predict_on_batch(self.points).astype("float64")
        return float(np.linalg.norm(found - self.exact) / np.linalg.norm(self.exact))

    def on_train_begin(self, logs=None):
        self.began = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(self.seconds[-1] + time.perf_counter() - self.began)
        self.errors.append(self.error())
        self.began = time.perf_counter()

    def seconds_to(self, error):
        reached = [s for s, e in zip(self.seconds, self.errors, strict=True) if e <= error]
        return reached[0] if reached else np.inf


def data_of(points, epochs, *callbacks):
    """Arguments of `fit`: all points in every step, and zero as the target of the residual."""
    targets = np.zeros((len(points), 1), "float32")
    return {
        "x": points, "y": targets, "batch_size": len(points), "epochs": epochs, "callbacks": callbacks, "verbose": 0
    }  # fmt: skip


def compile_adam(residual, epochs):
    """The residual as a model that `fit` trains by Adam."""
    residual.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-2, max(epochs, 1))), "mse")
    return residual


def compile_levenberg_marquardt(residual):
    """A model around the residual that `fit` trains by the Levenberg-Marquardt method."""
    trainer = kg.models.SecondOrder(residual)
    trainer.compile(kg.optimizers.LevenbergMarquardt(), "mse")
    return trainer


def train(residual, points, watch, adam_epochs, epochs):
    """Trains a residual towards zero: some full-batch steps of Adam, then of the Levenberg-Marquardt method."""
    compile_adam(residual, adam_epochs).fit(**data_of(points, adam_epochs, watch))
    by_adam = watch.errors[-1]
    compile_levenberg_marquardt(residual).fit(**data_of(points, epochs, watch))
    print(f"relative error: {by_adam:.1e} after Adam, {watch.errors[-1]:.1e} at the end, {watch.seconds[-1]:.0f} s")
    print(f"seconds until 1e-2: {watch.seconds_to(1e-2):.0f}, until 1e-3: {watch.seconds_to(1e-3):.0f}")
    return {"Adam": by_adam, "end": watch.errors[-1]}


def uniform(count, low, high, seed=0):
    """Points of the rectangle between the corners `low` and `high`."""
    return np.random.default_rng(seed).uniform(low, high, (count, len(low))).astype("float32")


def grid(low, high, size=101):
    """All points of a grid over the rectangle, the first coordinate along the slow axis."""
    axes = [np.linspace(a, b, size) for a, b in zip(low, high, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(low)).astype("float32")


def options_of(description, name, arguments, **epochs):
    """The options of a script, whose description begins with the name of its equation."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    for option, count in epochs.items():
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=count, help=f"{count} by default")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="the folder for the picture")
    options = parser.parse_args(arguments)

    import matplotlib

    matplotlib.use("agg")
    options.out.mkdir(parents=True, exist_ok=True)
    options.picture = options.out / f"{name}.png"
    keras.utils.set_random_seed(0)
    print(f"{description.splitlines()[0]} {keras.config.backend()}")
    return options


def draw(path, u, points, exact, watch, labels):
    """Draws the solution on a square grid, its error, and the error over the training time."""
    from matplotlib import pyplot

    found = u.predict_on_batch(points).astype("float64")
    size = round(len(points) ** 0.5)
    (left, bottom), (right, top) = points[0], points[-1]
    figure, (first, second, third) = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for axes, values, title, cmap in ((first, found, "u", "viridis"), (second, found - exact, "its error", "RdBu_r")):
        limit = np.abs(values).max() if cmap == "RdBu_r" else None
        picture = axes.imshow(
            values.reshape(size, size).T,
            origin="lower",
            extent=(left, right, bottom, top),
            aspect="auto",
            cmap=cmap,
            vmin=None if limit is None else -limit,
            vmax=limit,
        )
        axes.set(xlabel=labels[0], ylabel=labels[1], title=title)
        figure.colorbar(picture, ax=axes)
    third.semilogy(watch.seconds, watch.errors)
    third.set(xlabel="seconds of training", ylabel="relative error of u", title="Adam, then Levenberg-Marquardt")
    third.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    print(f"Picture: {path}")


def run(main):
    """Runs a script, with a hint if a package for pictures is missing."""
    try:
        main()
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error}: pip install "keras-gradtools[examples]"') from None
