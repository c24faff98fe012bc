"""The Allen-Cahn equation: two phases, separated by thin layers.

    u_t = a u_xx + 5 (u - u^3)  for -1 < x < 1, 0 < t < 1,  periodic in x,  and a = 0.001,

from u(0, x) = cos(pi x) (1 - cos(pi x)) / 2.

There is no solution in closed form. The reference is a spectral method in double precision: Fourier modes in x, and
fourth-order Runge-Kutta steps in t, with the diffusion exact (an integrating factor).

Run `python examples/differential_equations/allen_cahn.py`, with `KERAS_BACKEND=jax` or `torch` before it for another
backend. It writes allen_cahn.png to out/.
"""

from training import Watch, draw, grid, network, options_of, run, train, uniform  # before Keras: it starts the backend

# isort: split
import keras
import numpy as np
from keras import ops

import keras_gradtools as kg

DIFFUSIVITY = 0.001


def start(cosine):
    """The initial values, as a function of cos(pi x)."""
    return cosine * (1 - cosine) / 2


def reference(size=101, modes=1000, steps=20):
    """The solution on a grid of t and x, of shape (size * size, 1). `steps` is the number of steps to the next t."""
    x = np.linspace(-1, 1, modes, endpoint=False)
    h = 1 / ((size - 1) * steps)
    decay = np.exp(-DIFFUSIVITY * (np.pi * np.arange(modes // 2 + 1)) ** 2 * h / 2)

    def reaction(transformed):
        u = np.fft.irfft(transformed, modes)
        return 5 * np.fft.rfft(u - u**3)

    v, rows = np.fft.rfft(start(np.cos(np.pi * x))), []
    for i in range((size - 1) * steps + 1):
        if i % steps == 0:
            u = np.fft.irfft(v, modes)
            rows.append(np.append(u, u[0])[:: modes // (size - 1)])
        a = reaction(v)
        b = reaction(decay * (v + h / 2 * a))
        c = reaction(decay * v + h / 2 * b)
        d = reaction(decay**2 * v + h * decay * c)
        v = decay**2 * v + h / 6 * (decay**2 * a + 2 * decay * (b + c) + d)
    return np.stack(rows).reshape(-1, 1)


def build():
    """u, with its initial values and period whatever the network is, and the residual of the equation."""
    points = keras.Input((2,))
    t, x = points[:, :1], points[:, 1:]
    periodic = ops.concatenate([t, ops.cos(np.pi * x), ops.sin(np.pi * x)], axis=1)
    u = keras.Model(points, start(ops.cos(np.pi * x)) + t * network(periodic, units=20))
    d = kg.layers.PartialDerivatives(u, {"u": "", "u_t": "t", "u_xx": "xx"}, variables="tx")(points)
    return u, keras.Model(points, d["u_t"] - DIFFUSIVITY * d["u_xx"] - 5 * (d["u"] - d["u"] ** 3))


def main(arguments=None):
    options = options_of(__doc__, "allen_cahn", arguments, adam_epochs=200, epochs=200)
    u, residual = build()
    points, exact = grid([0, -1], [1, 1]), reference()
    watch = Watch(u, points, exact)
    errors = train(residual, uniform(1200, [0, -1], [1, 1]), watch, options.adam_epochs, options.epochs)
    draw(options.picture, u, points, exact, watch, "tx")
    return errors


if __name__ == "__main__":
    run(main)
