"""Learns the potential energy of a cluster of particles from energies and forces, and runs dynamics with it.

The model's forces are the negative gradient of its energy, F = -dE/dx, computed by a tape inside `call`. So they
conserve energy. `fit` trains energies and forces. A loss on forces is a loss on a derivative, so training
differentiates twice.

Source: Behler & Parrinello, "Generalized neural-network representation of high-dimensional potential-energy surfaces"
(Physical Review Letters 98, 146401, 2007) for the model; Morse (Physical Review 34, 57, 1929) for the potential.

Run `python examples/energy_and_forces.py`, with `KERAS_BACKEND=jax` or `torch` before it for another backend. It
writes its plot to out/.
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
from keras import layers, ops

PARTICLES = 7
STIFFNESS = 4.0
DISTANCES = 16
TEMPERATURE = 0.25
TRAINED = 128
TESTED = 256
TIME_STEP = 0.01
FORCE_WEIGHT = 3.0
NAMES = ("energies", "energies and forces")
COLORS = ("tab:red", "tab:blue")


def morse(positions):
    """The energies, in units of the depth of one bond, and forces of clusters of shape (n, particles, 3)."""
    difference = positions[:, :, None] - positions[:, None]
    distance = np.sqrt((difference**2).sum(axis=-1)) + np.eye(positions.shape[1])
    bond = np.exp(-STIFFNESS * (distance - 1.0)) * (1.0 - np.eye(positions.shape[1]))
    energy = 0.5 * (bond**2 - 2.0 * bond).sum(axis=(1, 2))
    slope = 2.0 * STIFFNESS * (bond - bond**2)
    return energy, -(slope[..., None] * difference / distance[..., None]).sum(axis=2)


def thermal_clusters(count, rng, steps=600):
    """Clusters at a temperature, by overdamped Langevin dynamics from random starts."""
    positions = rng.normal(0.0, 0.7, (count, PARTICLES, 3))
    step = 2.5e-3
    for _ in range(steps):
        force = np.clip(morse(positions)[1], -20.0, 20.0)
        # A weak force towards the center, because evaporated particles would never return.
        force -= 0.2 * (positions - positions.mean(axis=1, keepdims=True))
        positions += step * force + np.sqrt(2.0 * step * TEMPERATURE) * rng.normal(size=positions.shape)
    return positions


def load_data():
    rng = np.random.default_rng(0)
    positions = thermal_clusters(TRAINED + TESTED, rng).astype("float32")
    energy, forces = morse(positions.astype("float64"))
    labels = {"energy": energy[:, None].astype("float32"), "forces": forces.astype("float32")}
    train, test = slice(None, TRAINED), slice(TRAINED, None)
    return [(positions[part], {name: label[part] for name, label in labels.items()}) for part in (train, test)]


class Energy(keras.layers.Layer):
    """The sum over particles of a network, whose inputs count the other particles by distance."""

    def __init__(self, shift, scale, **kwargs):
        super().__init__(**kwargs)
        self.shift, self.scale = shift, scale
        # Smooth activations, because training on forces differentiates twice.
        self.network = keras.Sequential(
            [layers.Dense(32, activation="silu"), layers.Dense(32, activation="silu"), layers.Dense(1)]
        )

    def build(self, input_shape):
        self.network.build((*input_shape[:-1], DISTANCES))

    def call(self, positions):
        itself = ops.eye(positions.shape[1])
        difference = ops.expand_dims(positions, 2) - ops.expand_dims(positions, 1)
        # The square root has no gradient at zero: each particle's distance to itself is set to 1 and left out.
        distance = ops.sqrt(ops.sum(ops.square(difference), axis=-1) + itself)
        centers = ops.linspace(0.5, 3.0, DISTANCES)
        near = ops.exp(-ops.square((ops.expand_dims(distance, -1) - centers) / 0.25))
        around = ops.sum(near * ops.expand_dims(1.0 - itself, -1), axis=2)
        return self.shift + self.scale * ops.sum(self.network(around), axis=1)


class EnergyAndForces(keras.Model):
    """Maps positions (n, particles, 3) to energies (n, 1) and forces with the shape of the positions."""

    def __init__(self, shift, scale):
        super().__init__()
        self.energy = Energy(shift, scale)

    def build(self, input_shape):
        self.energy.build(input_shape)

    def call(self, positions):
        with kg.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(positions)
            energy = self.energy(positions)
        return {"energy": energy, "forces": -tape.gradient(energy, positions)}


def train(x, y, force_weight, epochs):
    keras.utils.set_random_seed(0)
    model = EnergyAndForces(float(y["energy"].mean()), float(y["energy"].std()) / PARTICLES)
    model.build(x.shape)
    rate = keras.optimizers.schedules.CosineDecay(5e-3, epochs * len(x) // 16)
    weights = {"energy": 1.0, "forces": force_weight}
    model.compile(keras.optimizers.Adam(rate), {"energy": "mse", "forces": "mse"}, loss_weights=weights)
    history = model.fit(x, y, batch_size=16, epochs=epochs, verbose=0)
    return model, history.history["loss"]


def trajectory(model, position, velocity, steps, time_step=TIME_STEP):
    """Velocity Verlet with the forces of the model: (positions, velocities, energies by the model), each over time."""

    # Detached, because torch would otherwise keep the graph of the whole trajectory.
    @kg.jit
    def step(x, v, force, dt):
        v = v + 0.5 * dt * force
        x = x + dt * v
        after = model(x)
        force = ops.stop_gradient(after["forces"])
        return x, v + 0.5 * dt * force, force, ops.stop_gradient(after["energy"])

    x, v = ops.convert_to_tensor(position), ops.convert_to_tensor(velocity)
    start = model(x)
    force, path = ops.stop_gradient(start["forces"]), [(position, velocity, numbers(start["energy"]))]
    for _ in range(steps):
        x, v, force, energy = step(x, v, force, time_step)
        path.append(tuple(map(numbers, (x, v, energy))))
    return [np.stack(part) for part in zip(*path, strict=True)]


def numbers(x):
    return ops.convert_to_numpy(ops.stop_gradient(x)).astype("float64")


def drifts(model, position, velocity, steps, time_step=TIME_STEP):
    """The change of the total energy along trajectories, for the model's potential and for the true one."""
    x, v, energy = trajectory(model, position, velocity, steps, time_step)
    kinetic = 0.5 * (v**2).sum(axis=(2, 3))
    true = morse(x.reshape(-1, *x.shape[2:]))[0].reshape(kinetic.shape)
    by_model, by_truth = kinetic + energy[..., 0], kinetic + true
    return by_model - by_model[0], by_truth - by_truth[0]


def root_mean_square(x):
    return float(np.sqrt(np.mean(np.square(x))))


def draw(predictions, y, drift, path):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    for ax, key, title in ((axes[0], "energy", "Energy of a cluster"), (axes[1], "forces", "Force components")):
        true = y[key].ravel()
        limits = true.min() - 0.05 * np.ptp(true), true.max() + 0.05 * np.ptp(true)
        ax.plot(limits, limits, color="0.4", linewidth=1)
        for name, color, predicted in zip(NAMES, COLORS, predictions, strict=True):
            error = root_mean_square(predicted[key] - y[key])
            label = f"trained on {name}: off by {error:.2f}"
            size, alpha = (12, 0.7) if key == "energy" else (3, 0.3)
            ax.scatter(true, predicted[key].ravel(), size, color, alpha=alpha, label=label, linewidths=0)
        ax.set(title=f"{title}, on test clusters", xlabel="true", ylabel="predicted", xlim=limits, ylim=limits)
    for name, color, (by_model, by_truth) in zip(NAMES, COLORS, drift, strict=True):
        times = TIME_STEP * np.arange(1, len(by_truth))
        for change, style, label in ((by_truth, "-", "true energy"), (by_model, ":", "its own energy")):
            typical = np.sqrt(np.mean(change[1:] ** 2, axis=1))
            axes[2].plot(times, typical, style, color=color, label=f"trained on {name}: {label}")
    axes[2].set(title="Change of the total energy along trajectories", xlabel="time", yscale="log")
    for ax in axes:
        ax.legend(fontsize="small", markerscale=2)
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds instead of a minute, and worse models")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="the folder for the plot")
    options = parser.parse_args(arguments)

    import matplotlib
    from rich.console import Console
    from rich.table import Table

    matplotlib.use("agg")
    epochs, steps = (25, 40) if options.quick else (300, 500)

    console = Console()
    (x, y), (x_test, y_test) = load_data()
    console.print(f"{TRAINED} clusters of {PARTICLES} particles, {keras.config.backend()}")
    models, losses = zip(*(train(x, y, weight, epochs) for weight in (0.0, FORCE_WEIGHT)), strict=True)
    predictions = [model.predict(x_test, batch_size=TESTED, verbose=0) for model in models]

    position = x_test[:16]
    velocity = np.random.default_rng(1).normal(0.0, TEMPERATURE**0.5, position.shape).astype("float32")
    drift = [drifts(model, position, velocity, steps) for model in models]

    results = {
        name: {
            "loss": loss,
            "energy error": root_mean_square(predicted["energy"] - y_test["energy"]),
            "force error": root_mean_square(predicted["forces"] - y_test["forces"]),
            "drift": root_mean_square(by_truth[-1]),
            "own drift": float(np.abs(by_model).max()),
        }
        for name, loss, predicted, (by_model, by_truth) in zip(NAMES, losses, predictions, drift, strict=True)
    }
    table = Table(title=f"{TESTED} test clusters", title_justify="left")
    for column in ("trained on", *NAMES, "standard deviation of the truth"):
        table.add_column(column, justify="left" if column == "trained on" else "right")
    spreads = {"energy error": y_test["energy"].std(), "force error": y_test["forces"].std()}
    for key, label in (
        ("energy error", "error of the energy"),
        ("force error", "error of a force component"),
        ("drift", "change of the true energy on a trajectory"),
        ("own drift", "largest change of the model's energy on a trajectory"),
    ):
        spread = f"{spreads[key]:.3f}" if key in spreads else ""
        table.add_row(label, *(f"{results[name][key]:.4f}" for name in NAMES), spread)
    console.print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    draw(predictions, y_test, drift, options.out / "energy_and_forces.png")
    console.print(f"Picture: energy_and_forces.png in {options.out}/")
    return results


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error}: pip install "keras-gradtools[examples]"') from None
