"""The Poisson equation in 100 dimensions, with a Laplacian that is estimated from random directions.

    sum_i u_ii = f  in the unit ball,  u = 0 on the sphere,  with the solution (1 - |x|^2) sin(x_1 - x_2 + x_3 - ...).

The exact Laplacian needs the derivatives along 100 axes at every step. The estimate uses 16 random directions, which
are drawn again at every step. Two networks are trained on the same points and for the same number of steps, one with
the exact Laplacian and one with the estimate.

Run `python examples/differential_equations/poisson_100d.py`, with `KERAS_BACKEND=jax` or `torch` before it for another
backend. It writes poisson_100d.png to out/.
"""

from training import Watch, network, options_of, run  # before Keras: it starts the backend

# isort: split
import keras
import numpy as np
from keras import ops

import keras_gradtools as kg

DIMENSIONS = 100
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
    u = keras.Model(points, (1 - ops.sum(points**2, axis=1, keepdims=True)) * network(points, units=64, depth=3))
    laplacian = kg.layers.Laplacian(u, samples=samples, seed=0 if samples else None)(points)
    return u, keras.Model(points, (laplacian - right_side(points)) / (3 * DIMENSIONS))


def ball(count, seed):
    """Points of random direction, with radii that are uniform between 0 and 1."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, DIMENSIONS))
    return (x * rng.uniform(size=(count, 1)) / np.linalg.norm(x, axis=1, keepdims=True)).astype("float32")


def train(samples, points, tested, epochs):
    keras.utils.set_random_seed(0)
    u, residual = build(samples)
    watch = Watch(u, tested, solution(tested))
    steps = epochs * len(points) // 100
    residual.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(3e-3, steps)), "mse")
    targets = np.zeros((len(points), 1), "float32")
    residual.fit(points, targets, batch_size=100, epochs=epochs, verbose=0, callbacks=[watch])
    name = f"{samples} random directions" if samples else "exact"
    print(f"{name}: relative error {watch.errors[-1]:.1e} after {steps} steps, {watch.seconds[-1]:.0f} s")
    return u, watch


def draw(path, u, tested, watches):
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(solution(tested), u.predict_on_batch(tested), ".", markersize=3)
    left.axline((0, 0), slope=1, color="0.6")
    left.set(xlabel="solution", ylabel="u", title="1000 points of the ball")
    for name, watch in watches.items():
        right.semilogy(watch.seconds, watch.errors, label=name)
    right.set(xlabel="seconds of training", ylabel="relative error of u", title="Laplacian, exact and estimated")
    right.grid(alpha=0.3)
    right.legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    print(f"Picture: {path}")


def main(arguments=None):
    options = options_of(__doc__, "poisson_100d", arguments, epochs=10)
    points, tested = ball(10_000, seed=0), ball(1000, seed=1)
    _, exact = train(None, points, tested, options.epochs)
    u, estimated = train(16, points, tested, options.epochs)
    draw(options.picture, u, tested, {"exact": exact, "16 random directions": estimated})
    return {"exact": exact.errors[-1], "estimated": estimated.errors[-1]}


if __name__ == "__main__":
    run(main)
