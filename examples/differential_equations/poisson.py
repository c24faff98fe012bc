"""The Poisson equation in two dimensions.

    u_xx + u_yy = f  for 0 < x, y < 1,  u = 0 at the boundary,  with the solution sin(pi x) sin(2 pi y).

Run `python examples/differential_equations/poisson.py`, with `KERAS_BACKEND=jax` or `torch` before it for another
backend. It writes poisson.png to out/.
"""

from training import Watch, draw, grid, network, options_of, run, train, uniform  # before Keras: it starts the backend

# isort: split
import keras
import numpy as np
from keras import ops

import keras_gradtools as kg


def solution(points):
    x, y = np.asarray(points, "float64").T
    return (np.sin(np.pi * x) * np.sin(2 * np.pi * y))[:, None]


def build():
    """u, which is zero at the boundary whatever the network is, and the residual of the equation."""
    points = keras.Input((2,))
    x, y = points[:, :1], points[:, 1:]
    u = keras.Model(points, x * (1 - x) * y * (1 - y) * network(points))
    f = -5 * np.pi**2 * ops.sin(np.pi * x) * ops.sin(2 * np.pi * y)
    return u, keras.Model(points, kg.layers.Laplacian(u)(points) - f)


def main(arguments=None):
    options = options_of(__doc__, "poisson", arguments, adam_epochs=200, epochs=60)
    u, residual = build()
    points = grid([0, 0], [1, 1])
    watch = Watch(u, points, solution(points))
    errors = train(residual, uniform(500, [0, 0], [1, 1]), watch, options.adam_epochs, options.epochs)
    draw(options.picture, u, points, solution(points), watch, "xy")
    return errors


if __name__ == "__main__":
    run(main)
