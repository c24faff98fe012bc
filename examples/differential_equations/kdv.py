"""The Korteweg-de Vries equation, of third order: a solitary wave.

    u_t + 6 u u_x + u_xxx = 0  for -8 < x < 8, 0 < t < 1,  with the solution 2 / cosh(x + 2 - 4 t)^2.

The wave keeps its shape and moves from -2 to 2. At the boundaries it is zero up to 5e-5. Of the three boundary
conditions, one belongs to the left end, u = 0, and two to the right end, u = u_x = 0.

Run `python examples/differential_equations/kdv.py`, with `KERAS_BACKEND=jax` or `torch` before it for another backend.
It writes kdv.png to out/.
"""

from training import Watch, draw, grid, network, options_of, run, train, uniform  # before Keras: it starts the backend

# isort: split
import keras
import numpy as np
from keras import ops

import keras_gradtools as kg


def solution(points):
    t, x = np.asarray(points, "float64").T
    return (2 / np.cosh(x + 2 - 4 * t) ** 2)[:, None]


def build():
    """u, with its initial and boundary values whatever the network is, and the residual of the equation."""
    points = keras.Input((2,))
    t, x = points[:, :1], points[:, 1:]
    boundary = (1 + x / 8) * (1 - x / 8) ** 2
    u = keras.Model(points, 2 / ops.cosh(x + 2) ** 2 + t * boundary * network(points, units=20))
    names = {"u": "", "u_t": "t", "u_x": "x", "u_xxx": "xxx"}
    d = kg.layers.PartialDerivatives(u, names, variables="tx")(points)
    return u, keras.Model(points, d["u_t"] + 6 * d["u"] * d["u_x"] + d["u_xxx"])


def main(arguments=None):
    options = options_of(__doc__, "kdv", arguments, adam_epochs=200, epochs=150)
    u, residual = build()
    points = grid([0, -8], [1, 8])
    watch = Watch(u, points, solution(points))
    errors = train(residual, uniform(1200, [0, -8], [1, 8]), watch, options.adam_epochs, options.epochs)
    draw(options.picture, u, points, solution(points), watch, "tx")
    return errors


if __name__ == "__main__":
    run(main)
