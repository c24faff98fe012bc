"""The Poisson equation in 100 dimensions, with an exact Laplacian and with one that random directions estimate.

    sum_i u_ii = f  in the unit ball,  u = 0 on the sphere,  with the solution (1 - |x|^2) sin(x_1 - x_2 + x_3 - ...).

Besides the factor, the solution depends on one direction only. The network is not told which one: it has to find it,
and the wave along it. It is small, because with fewer weights than points, the points determine the weights.

The Laplacian is exact. For comparison, the steps of Adam are also taken with an estimate. The exact Laplacian needs the
derivatives along 100 axes at every step. The estimate uses 16 random directions, which are drawn again at every step.

Run `python examples/differential_equations/poisson_100d.py`, with `KERAS_BACKEND=jax` or `torch` before it for another
backend. It writes poisson_100d.png to out/.
"""

from training import (
    Watch,
    compile_adam,
    data_of,
    network,
    options_of,
    run,
    train,
)  # before Keras: it starts the backend

# isort: split
import keras
import numpy as np
from keras import ops

import keras_gradtools as kg

DIMENSIONS, UNITS = 100, 10
SIGNS = np.where(np.arange(DIMENSIONS) % 2 == 0, 1.0, -1.0).astype("float32")[:, None]


def solution(points):
    x = np.asarray(points, "float64")
    return (1 - (x**2).sum(axis=1, keepdims=True)) * np.sin(x @ SIGNS)


def right_side(x):
    """The Laplacian of the solution, by the product rule."""
    s, inside = ops.matmul(x, SIGNS), 1 - ops.sum(x**2, axis=1, keepdims=True)
    return -(2 + inside) * DIMENSIONS * ops.sin(s) - 4 * s * ops.cos(s)


def build(samples=None):
    """u, which is zero on the sphere whatever the network is, and the residual of the equation, in units of f."""
    points = keras.Input((DIMENSIONS,))
    u = keras.Model(points, (1 - ops.sum(points**2, axis=1, keepdims=True)) * network(points, units=UNITS))
    laplacian = kg.layers.Laplacian(u, samples=samples, seed=0 if samples else None)(points)
    return u, keras.Model(points, (laplacian - right_side(points)) / (3 * DIMENSIONS))


def ball(count, seed):
    """Points of random direction, with radii that are uniform between 0 and 1."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, DIMENSIONS))
    return (x * rng.uniform(size=(count, 1)) / np.linalg.norm(x, axis=1, keepdims=True)).astype("float32")


def draw(path, u, tested, watches):
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    along, inside = tested @ SIGNS, 1 - (tested**2).sum(axis=1, keepdims=True)
    left.plot(along, u.predict_on_batch(tested) / inside, ".", markersize=4, label="the network")
    line = np.linspace(along.min(), along.max(), 200)
    left.plot(line, np.sin(line), color="0.6", linewidth=1, zorder=0, label="the solution")
    left.set(xlabel="$x_1 - x_2 + x_3 - ...$", ylabel="$u / (1 - |x|^2)$", title=f"{len(tested)} points of the ball")
    left.legend()
    for name, watch in watches.items():
        right.semilogy(watch.seconds, watch.errors, label=name)
    right.set(xlabel="seconds of training", ylabel="relative error of u", title="Laplacian, exact and estimated")
    right.grid(alpha=0.3)
    right.legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    print(f"Picture: {path}")


def main(arguments=None):
    options = options_of(__doc__, "poisson_100d", arguments, points=6000, adam_epochs=60, epochs=60)
    points, tested = ball(options.points, seed=0), ball(1000, seed=1)
    u, residual = build()
    watch = Watch(u, tested, solution(tested))
    errors = train(residual, points, watch, options.adam_epochs, options.epochs)
    keras.utils.set_random_seed(0)
    estimated, residual = build(samples=16)
    estimate_watch = Watch(estimated, tested, solution(tested))
    compile_adam(residual, options.adam_epochs).fit(**data_of(points, options.adam_epochs, estimate_watch))
    print(f"with 16 random directions: {estimate_watch.errors[-1]:.1e} after Adam, {estimate_watch.seconds[-1]:.0f} s")
    draw(options.picture, u, tested, {"exact": watch, "16 random directions": estimate_watch})
    return {**errors, "Adam, estimated": estimate_watch.errors[-1]}


if __name__ == "__main__":
    run(main)
