"""Solves u'' = f with physics-informed networks of four activations, trained by the Levenberg-Marquardt method.

    u'' = f  for 0 < x < 1,  u(0) = u(1) = 0,  with the solution u(x) = sin(pi x) + sin(4 pi x) / 2.

The trial function x (1 - x) N(x) satisfies the boundary conditions for any network N (hard boundaries), so the loss has
one term and no weights to tune. The equation contains the second derivative of N. With an activation whose second
derivative is zero, such as ReLU, the network cannot be trained to satisfy it.

Source: Lagaris, Likas & Fotiadis (arXiv:physics/9705023) for hard boundaries; Sitzmann et al. (arXiv:2006.09661) for
the sine.

Run `python examples/pinn_activations.py`, with `KERAS_BACKEND=jax` or `torch` before it for another backend. It writes
pinn_activations.png to out/.
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

ACTIVATIONS = {"tanh": ops.tanh, "sin": ops.sin, "gelu": keras.activations.gelu, "relu": ops.relu}
STYLES = dict(zip(ACTIVATIONS, ("-", "--", "-.", ":"), strict=True))
POINTS = 200


def solution(x):
    return np.sin(np.pi * x) + 0.5 * np.sin(4 * np.pi * x)


def right_side(x):
    """The second derivative of the solution."""
    return -(np.pi**2) * np.sin(np.pi * x) - 8 * np.pi**2 * np.sin(4 * np.pi * x)


class Network(keras.Model):
    """N(x), with inputs scaled to the range from -2 to 2, where the activations bend."""

    def __init__(self, activation, units=12):
        super().__init__()
        self.hidden = [layers.Dense(units, activation), layers.Dense(units, activation)]
        self.out = layers.Dense(1)

    def call(self, x):
        h = 4.0 * x - 2.0
        for layer in self.hidden:
            h = layer(h)
        return self.out(h)


class Solution(keras.Model):
    """u(x), which is zero at both boundaries whatever the network is."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def build(self, input_shape):
        self.network(np.zeros((1, 1), "float32"))

    def call(self, x):
        return x * (1.0 - x) * self.network(x)


class Equation(keras.Model):
    """u'' at each point: an ordinary model, which `fit` trains towards the right side."""

    def __init__(self, u):
        super().__init__()
        self.u = u
        self.second_derivative = kg.layers.Laplacian(u)

    def call(self, x):
        return self.second_derivative(x)


def train(activation, epochs, seed=0):
    """The trained u, and the root mean square of its residual u'' - f after each step, in relation to that of f."""
    keras.utils.set_random_seed(seed)
    x = np.linspace(0, 1, POINTS, dtype="float32")[:, None]
    f = right_side(x).astype("float32")
    equation = Equation(Solution(Network(activation)))
    equation(x)
    trainer = kg.models.SecondOrder(equation)
    trainer.compile(kg.optimizers.LevenbergMarquardt(), "mse")
    losses = trainer.fit(x, f, batch_size=POINTS, epochs=epochs, verbose=0).history["loss"]
    return equation.u, np.sqrt(losses / np.mean(f**2))


def measure(u, x):
    """The relative error of u, and the largest second derivative of its network."""
    found = u.predict(x, batch_size=len(x), verbose=0).astype("float64")
    second = ops.convert_to_numpy(kg.laplacian(u.network)(ops.convert_to_tensor(x)))
    error = float(np.linalg.norm(found - solution(x)) / np.linalg.norm(solution(x)))
    return found, error, float(np.abs(second).max())


def draw(curves, residuals, x, path):
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot(x, solution(x), color="0.6", linewidth=5, label="solution")
    for name, curve in curves.items():
        left.plot(x, curve, STYLES[name], label=name)
        right.semilogy(residuals[name], STYLES[name], label=name)
    left.set(title="u(x)", xlabel="x", ylim=(-1.2, 2.0))
    right.set(title="Relative residual of the equation", xlabel="Levenberg-Marquardt steps")
    right.grid(alpha=0.3)
    for ax in (left, right):
        ax.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--activations", nargs="+", choices=ACTIVATIONS, default=list(ACTIVATIONS))
    parser.add_argument("--epochs", type=int, default=100, help="number of steps of the Levenberg-Marquardt method")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="the folder for the picture")
    options = parser.parse_args(arguments)

    import matplotlib

    matplotlib.use("agg")
    print(f"{options.epochs} Levenberg-Marquardt steps on {POINTS} points, {keras.config.backend()}")
    x = np.linspace(0, 1, 401, dtype="float32")[:, None]
    curves, residuals, errors, seconds = {}, {}, {}, {}
    for name in options.activations:
        u, residuals[name] = train(ACTIVATIONS[name], options.epochs)
        curves[name], errors[name], seconds[name] = measure(u, x)
        print(
            f"{name:4}: relative residual {residuals[name][-1]:.1e}, relative error of u {errors[name]:.1e}, "
            f"largest N'' {seconds[name]:.3g}"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    draw(curves, residuals, x, options.out / "pinn_activations.png")
    print(f"Picture: pinn_activations.png in {options.out}/")
    return residuals, errors, seconds


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error}: pip install "keras-gradtools[examples]"') from None
