"""A clamped plate under a load: the biharmonic equation, of fourth order.

    w_xxxx + 2 w_xxyy + w_yyyy = q  for 0 < x, y < 1,  with w = 0 and a slope of zero at the edges,

and the solution w = sin(pi x)^2 sin(pi y)^2.

Run `python examples/differential_equations/plate.py`, with `KERAS_BACKEND=jax` or `torch` before it for another
backend. It writes plate.png to out/.
"""

from training import Watch, draw, grid, network, options_of, run, train, uniform  # before Keras: it starts the backend

# isort: split
import keras
import numpy as np
from keras import ops

import keras_gradtools as kg


def solution(points):
    x, y = np.asarray(points, "float64").T
    return (np.sin(np.pi * x) ** 2 * np.sin(np.pi * y) ** 2)[:, None]


def build():
    """w, which is clamped whatever the network is, and the residual of the equation, in units of the largest load."""
    points = keras.Input((2,))
    x, y = points[:, :1], points[:, 1:]
    edges = 16 * x * (1 - x) * y * (1 - y)
    w = keras.Model(points, edges**2 * network(points))
    names = {"w_xxxx": "xxxx", "w_xxyy": "xxyy", "w_yyyy": "yyyy"}
    d = kg.layers.PartialDerivatives(w, names, variables="xy")(points)
    a, b = ops.cos(2 * np.pi * x), ops.cos(2 * np.pi * y)
    load = 4 * np.pi**4 * (4 * a * b - a - b)
    return w, keras.Model(points, (d["w_xxxx"] + 2 * d["w_xxyy"] + d["w_yyyy"] - load) / (24 * np.pi**4))


def main(arguments=None):
    options = options_of(__doc__, "plate", arguments, adam_epochs=200, epochs=60)
    w, residual = build()
    points = grid([0, 0], [1, 1])
    watch = Watch(w, points, solution(points))
    errors = train(residual, uniform(500, [0, 0], [1, 1]), watch, options.adam_epochs, options.epochs)
    draw(options.picture, w, points, solution(points), watch, "xy")
    return errors


if __name__ == "__main__":
    run(main)
