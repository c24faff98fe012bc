"""A physics-informed network for the heat equation, trained by Adam and by the Levenberg-Marquardt method.

    u_t = a u_xx  for 0 < x < 1,  u(0, t) = u(1, t) = 0,  u(x, 0) = sin(pi x) + sin(3 pi x) / 2,

with the known solution exp(-a pi^2 t) sin(pi x) + exp(-9 a pi^2 t) sin(3 pi x) / 2. The network is trained in `fit` on
the squared residuals of the equation at some points, first by Adam, then by `kg.models.SecondOrder` with
`kg.optimizers.LevenbergMarquardt`. For comparison, it is trained for the same total time by Adam alone.

Run `python examples/heat_equation.py`, with `KERAS_BACKEND=jax` or `torch` before it for another backend. It writes
heat_equation.png to out/.
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

DIFFUSIVITY = 0.1
POINTS = 500


def solution(points):
    """The exact solution at points of shape (n, 2), in double precision."""
    x, t = np.asarray(points, "float64").T
    decay = DIFFUSIVITY * np.pi**2 * t
    return (np.exp(-decay) * np.sin(np.pi * x) + 0.5 * np.exp(-9 * decay) * np.sin(3 * np.pi * x))[:, None]


@keras.saving.register_keras_serializable(package="heat_equation")
class Temperature(keras.Model):
    """u(x, t), which satisfies the initial and boundary conditions for any network."""

    def __init__(self, units=16, **kwargs):
        super().__init__(**kwargs)
        self.hidden = [layers.Dense(units, "tanh"), layers.Dense(units, "tanh"), layers.Dense(1)]

    def call(self, points):
        x, t = points[:, :1], points[:, 1:]
        start = ops.sin(np.pi * x) + 0.5 * ops.sin(3 * np.pi * x)
        h = points
        for layer in self.hidden:
            h = layer(h)
        return start + t * x * (1 - x) * h


@keras.saving.register_keras_serializable(package="heat_equation")
class HeatEquation(keras.Model):
    """The residual of the equation, u_t - a u_xx, at each point: an ordinary model, trained towards zero."""

    def __init__(self, temperature, **kwargs):
        super().__init__(**kwargs)
        self.temperature = temperature
        self.second_derivative = kg.layers.Laplacian(temperature, axes=[0])  # of x, not of t

    def call(self, points):
        with kg.GradientTape() as tape:
            tape.watch(points)
            u = self.temperature(points)
        u_t = tape.gradient(u, points)[:, 1:]
        return u_t - DIFFUSIVITY * self.second_derivative(points)


class ErrorOverTime(keras.callbacks.Callback):
    """The relative error of the temperature on a grid, over the training time without the time of this callback."""

    def __init__(self, temperature, every, seconds=np.inf, start=0.0):
        super().__init__()
        axis = np.linspace(0, 1, 41)
        self.grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2).astype("float32")
        self.exact = solution(self.grid)
        self.temperature, self.every, self.limit = temperature, every, seconds
        self.spent, self.seconds, self.errors = start, [], []

    def measure(self):
        found = self.temperature.predict_on_batch(self.grid).astype("float64")
        self.seconds.append(self.spent)
        self.errors.append(float(np.linalg.norm(found - self.exact) / np.linalg.norm(self.exact)))

    def on_train_begin(self, logs=None):
        self.measure()
        self.began = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        now = time.perf_counter()
        self.spent += now - self.began
        if (epoch + 1) % self.every == 0:
            self.measure()
        if self.spent >= self.limit:
            self.model.stop_training = True
        self.began = time.perf_counter()


def build(seed):
    keras.utils.set_random_seed(seed)
    temperature = Temperature()
    equation = HeatEquation(temperature)
    equation(np.zeros((2, 2), "float32"))
    return temperature, equation


def adam(steps):
    return keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-2, steps))


def train(trainer, optimizer, data, epochs, watch):
    """Compiles first, so that the time includes no compilation, and then trains."""
    trainer.compile(optimizer, "mse")
    weights = trainer.get_weights()
    trainer.fit(*data, batch_size=POINTS, epochs=1, verbose=0)
    trainer.set_weights(weights)
    trainer.compile(optimizer.from_config(optimizer.get_config()), "mse")
    trainer.fit(*data, batch_size=POINTS, epochs=1, verbose=0)
    trainer.set_weights(weights)
    trainer.fit(*data, batch_size=POINTS, epochs=epochs, verbose=0, callbacks=[watch])


def plot(watched, switch, temperature, path):
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for name, watch in watched.items():
        left.semilogy(watch.seconds, watch.errors, label=name)
    left.axvline(switch, color="0.6", linestyle=":", label="change of the optimizer")
    left.set(xlabel="seconds of training", ylabel="relative error of u", title="Error over time")
    left.legend()
    axis = np.linspace(0, 1, 101)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2).astype("float32")
    found = temperature.predict_on_batch(points).astype("float64")
    pictures = (
        (middle, found, "Temperature u(x, t)", "inferno"),
        (right, found - solution(points), "Its error", "RdBu_r"),
    )
    for axes, values, title, cmap in pictures:
        limit = np.abs(values).max()
        low = -limit if cmap == "RdBu_r" else None
        picture = axes.imshow(
            values.reshape(101, 101), origin="lower", extent=(0, 1, 0, 1), cmap=cmap, vmin=low, vmax=limit
        )
        axes.set(xlabel="time t", ylabel="place x", title=title)
        figure.colorbar(picture, ax=axes)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="the folder for the plot")
    parser.add_argument("--adam-epochs", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=80, help="number of epochs of the Levenberg-Marquardt method")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    import matplotlib
    from rich.console import Console
    from rich.table import Table

    matplotlib.use("agg")
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)

    points = np.random.default_rng(options.seed).uniform(size=(POINTS, 2)).astype("float32")
    data = points, np.zeros((POINTS, 1), "float32")
    temperature, equation = build(options.seed)
    watch = ErrorOverTime(temperature, every=max(options.adam_epochs // 50, 1))
    train(equation, adam(options.adam_epochs), data, options.adam_epochs, watch)
    by_adam, switch = watch.errors[-1], watch.spent
    both = ErrorOverTime(temperature, every=1, start=switch)
    train(kg.models.SecondOrder(equation), kg.optimizers.LevenbergMarquardt(), data, options.epochs, both)
    watched = {"Adam, then Levenberg-Marquardt": both}
    both.seconds, both.errors = watch.seconds + both.seconds, watch.errors + both.errors

    _, alone = build(options.seed)
    steps = round(options.adam_epochs * both.spent / switch)
    watched["Adam alone"] = ErrorOverTime(alone.temperature, every=max(steps // 100, 1), seconds=both.spent)
    train(alone, adam(steps), data, steps, watched["Adam alone"])

    table = Table(title=f"The heat equation, {keras.config.backend()}", title_justify="left")
    for column in ("training", "seconds", "relative error of u"):
        table.add_column(column, justify="left" if column == "training" else "right")
    table.add_row(f"Adam, {options.adam_epochs} steps", f"{switch:.1f}", f"{by_adam:.1e}")
    table.add_row(f"then Levenberg-Marquardt, {options.epochs} steps", f"{both.spent:.1f}", f"{both.errors[-1]:.1e}")
    watched["Adam alone"].measure()
    found = watched["Adam alone"]
    table.add_row(f"Adam alone, {steps} steps", f"{found.spent:.1f}", f"{found.errors[-1]:.1e}")
    console.print(table)
    plot(watched, switch, temperature, options.out / "heat_equation.png")
    console.print(f"Picture: heat_equation.png in {options.out}/")
    return {"Adam": by_adam, "both": both.errors[-1], "Adam alone": found.errors[-1]}


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error}: pip install "keras-gradtools[examples]"') from None
