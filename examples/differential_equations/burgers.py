"""The Burgers equation, whose solution becomes steep.

    u_t + u u_x = v u_xx  for -1 < x < 1, 0 < t < 1,  u(0, x) = -sin(pi x),  u(t, -1) = u(t, 1) = 0,  v = 0.02.

Cole and Hopf transform it into the heat equation. The reference solution is the quotient of two integrals that follows
from this, by Gauss-Hermite quadrature.

Run `python examples/differential_equations/burgers.py`, with `KERAS_BACKEND=jax` or `torch` before it for another
backend. It writes burgers.png to out/.

Source: Basdevant et al., "Spectral and finite difference solutions of the Burgers equation" (1986).
"""

from training import Watch, draw, grid, network, options_of, run, train, uniform  # before Keras: it starts the backend

# isort: split
import keras
import numpy as np
from keras import ops

import keras_gradtools as kg

VISCOSITY = 0.02


def solution(points):
    t, x = np.asarray(points, "float64").T[..., None]
    nodes, weights = np.polynomial.hermite.hermgauss(100)
    y = x - np.sqrt(4 * VISCOSITY * t) * nodes
    # The exponents are negative, so that nothing overflows.
    heat = weights * np.exp(-(1 + np.cos(np.pi * y)) / (2 * np.pi * VISCOSITY))
    return -(np.sin(np.pi * y) * heat).sum(axis=1, keepdims=True) / heat.sum(axis=1, keepdims=True)


def build():
    """u, with its initial and boundary values whatever the network is, and the residual of the equation."""
    points = keras.Input((2,))
    t, x = points[:, :1], points[:, 1:]
    u = keras.Model(points, -ops.sin(np.pi * x) + t * (1 - x**2) * network(points, units=20))
    d = kg.layers.PartialDerivatives(u, {"u": "", "u_t": "t", "u_x": "x", "u_xx": "xx"}, variables="tx")(points)
    return u, keras.Model(points, d["u_t"] + d["u"] * d["u_x"] - VISCOSITY * d["u_xx"])


def main(arguments=None):
    options = options_of(__doc__, "burgers", arguments, adam_epochs=200, epochs=150)
    u, residual = build()
    points = grid([0, -1], [1, 1])
    watch = Watch(u, points, solution(points))
    errors = train(residual, uniform(1200, [0, -1], [1, 1]), watch, options.adam_epochs, options.epochs)
    draw(options.picture, u, points, solution(points), watch, "tx")
    return errors


if __name__ == "__main__":
    run(main)
