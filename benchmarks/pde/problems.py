"""Six differential equations with known or computed solutions.

The network is part of a formula (`ansatz`) that satisfies initial and boundary conditions, except for Poisson's
equation in ten dimensions, whose boundary values are residuals at points of their own. Formulas take the module of
their functions, `keras.ops` or NumPy, so that the error is computed from the weights without the framework.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

PI, VISCOSITY, DIFFUSIVITY, INTERFACE = np.pi, 0.01 / np.pi, 0.1, 1e-3
DIMENSIONS, BOUNDARY_WEIGHT = 10, 10.0


@dataclasses.dataclass(frozen=True)
class Problem:
    """One equation.

    Attributes:
        name: Its name in results and on the command line.
        title: Its name in the report.
        formula: The equation and its domain, for the report.
        sample: A function of a random generator that returns the training points, of shape `(n, columns)`.
        derivatives: What `kg.partial_derivatives` computes, in terms of the letters in `variables`.
        variables: A letter for each column. None if the equation is in terms of the Laplacian.
        equation: `equation(functions, points, derivatives)`, the residuals, of shape `(n, 1)`.
        ansatz: `ansatz(functions, points, network output)`, the solution.
        exact: A function that returns test points and the solution there.
        features: `features(functions, points)`, the inputs of the network.
        inputs: The number of these inputs.
    """

    name: str
    title: str
    formula: str
    sample: Callable
    derivatives: dict | None
    variables: str | None
    equation: Callable
    ansatz: Callable
    exact: Callable
    features: Callable = lambda f, p: p
    inputs: int = 2


def uniform(count, low, high):
    return lambda rng: rng.uniform(low, high, size=(count, len(low)))


def grid(low, high, counts):
    axes = [np.linspace(a, b, n) for a, b, n in zip(low, high, counts, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(low))


def on_grid(solution, low, high, counts=(81, 81)):
    def exact():
        points = grid(low, high, counts)
        return points, solution(points)

    return exact


# --- Poisson's equation in two dimensions ---


def _poisson_exact(p):
    return np.prod(np.sin(PI * p), axis=1, keepdims=True)


def _poisson(f, p, d):
    x, y = p[:, :1], p[:, 1:]
    return d["xx"] + d["yy"] + 2.0 * PI**2 * f.sin(PI * x) * f.sin(PI * y)


def _zero_on_the_unit_square(f, p, h):
    x, y = p[:, :1], p[:, 1:]
    return x * (1.0 - x) * y * (1.0 - y) * h


# --- the heat equation ---


def _heat_exact(p):
    x, t = p[:, :1], p[:, 1:]
    decay = DIFFUSIVITY * PI**2 * t
    return np.exp(-decay) * np.sin(PI * x) + 0.5 * np.exp(-9.0 * decay) * np.sin(3.0 * PI * x)


def _heat_ansatz(f, p, h):
    x, t = p[:, :1], p[:, 1:]
    return f.sin(PI * x) + 0.5 * f.sin(3.0 * PI * x) + t * x * (1.0 - x) * h


# --- Burgers' equation ---


def _burgers_points(rng):
    """Half of the points lie near the shock at x = 0."""
    x = np.concatenate([rng.uniform(-1, 1, 750), np.clip(rng.normal(0.0, 0.1, 750), -1, 1)])
    return np.stack([x, rng.uniform(0, 1, 1500)], axis=1)


def _burgers_exact(p, nodes=200):
    """The Cole-Hopf transform, integrated by Gauss-Hermite quadrature."""
    x, t = p[:, :1], p[:, 1:]
    z, weights = np.polynomial.hermite.hermgauss(nodes)
    y = x - np.sqrt(4.0 * VISCOSITY * t) * z
    exponents = -np.cos(PI * y) / (2.0 * PI * VISCOSITY)
    kernel = weights * np.exp(exponents - exponents.max(axis=1, keepdims=True))
    return -np.sum(kernel * np.sin(PI * y), axis=1, keepdims=True) / np.sum(kernel, axis=1, keepdims=True)


def _burgers_ansatz(f, p, h):
    x, t = p[:, :1], p[:, 1:]
    return -f.sin(PI * x) + t * (1.0 - x**2) * h


# --- the Helmholtz equation ---


def _helmholtz_exact(p):
    return np.sin(PI * p[:, :1]) * np.sin(4.0 * PI * p[:, 1:])


def _helmholtz(f, p, d):
    source = (1.0 - 17.0 * PI**2) * f.sin(PI * p[:, :1]) * f.sin(4.0 * PI * p[:, 1:])
    return (d["xx"] + d["yy"] + d["u"] - source) / 10.0


def _zero_on_the_square(f, p, h):
    x, y = p[:, :1], p[:, 1:]
    return (1.0 - x**2) * (1.0 - y**2) * h


# --- the Allen-Cahn equation ---


def _start(f, x):
    return 0.5 * f.cos(PI * x) + 0.3 * f.sin(2.0 * PI * x)


def _allen_cahn_ansatz(f, p, h):
    return _start(f, p[:, :1]) + p[:, 1:] * h


def _periodic(f, p):
    x, t = p[:, :1], p[:, 1:]
    return f.concatenate([f.cos(PI * x), f.sin(PI * x), t], axis=1)


@functools.cache
def _allen_cahn_reference(modes=512, steps=4000):
    """A Fourier method in space, and the fourth-order Runge-Kutta method with an integrating factor in time."""
    x = np.linspace(-1, 1, modes, endpoint=False)
    decay = -INTERFACE * (PI * np.fft.rfftfreq(modes, 1.0 / modes)) ** 2
    step, saved = 1.0 / steps, [_start(np, x)]
    half, whole = np.exp(0.5 * step * decay), np.exp(step * decay)

    def reaction(v):
        u = np.fft.irfft(v)
        return np.fft.rfft(5.0 * (u - u**3))

    v = np.fft.rfft(saved[0])
    for i in range(steps):
        a = step * reaction(v)
        b = step * reaction(half * (v + a / 2))
        c = step * reaction(half * v + b / 2)
        d = step * reaction(whole * v + half * c)
        v = whole * v + (whole * a + 2.0 * half * (b + c) + d) / 6.0
        if (i + 1) % (steps // 40) == 0:
            saved.append(np.fft.irfft(v))
    return x, np.linspace(0, 1, 41), np.stack(saved, axis=1)


def _allen_cahn_exact():
    x, t, u = _allen_cahn_reference()
    points = np.stack(np.meshgrid(x[::4], t, indexing="ij"), axis=-1).reshape(-1, 2)
    return points, u[::4].reshape(-1, 1)


# --- Poisson's equation in ten dimensions: -Delta u = 0, with values at the boundary ---


def _pairs(p):
    return sum(p[:, 2 * i : 2 * i + 1] * p[:, 2 * i + 1 : 2 * i + 2] for i in range(DIMENSIONS // 2))


def _cube_points(rng):
    """The last column is 1 on the boundary."""
    inside, boundary = rng.uniform(size=(600, DIMENSIONS + 1)), rng.uniform(size=(400, DIMENSIONS + 1))
    boundary[np.arange(400), rng.integers(0, DIMENSIONS, 400)] = rng.integers(0, 2, 400)
    inside[:, -1], boundary[:, -1] = 0.0, 1.0
    return np.concatenate([inside, boundary])


def _cube(f, p, d):
    on_boundary = p[:, DIMENSIONS:]
    return on_boundary * BOUNDARY_WEIGHT * (d["u"] - _pairs(p)) + (1.0 - on_boundary) * d["laplacian"]


def _cube_exact():
    points = np.random.default_rng(0).uniform(size=(4000, DIMENSIONS))
    return points, _pairs(points)


SECOND = {"xx": "xx", "yy": "yy"}
PROBLEMS = [
    Problem(
        "poisson_2d", "Poisson, 2D", "Δu = −2π² sin πx sin πy on (0, 1)²", uniform(1000, (0, 0), (1, 1)),
        SECOND, "xy", _poisson, _zero_on_the_unit_square, on_grid(_poisson_exact, (0, 0), (1, 1)),
    ),
    Problem(
        "heat", "Heat", "u_t = 0.1 u_xx on (0, 1)²", uniform(1000, (0, 0), (1, 1)),
        {"t": "t", "xx": "xx"}, "xt", lambda f, p, d: d["t"] - DIFFUSIVITY * d["xx"], _heat_ansatz,
        on_grid(_heat_exact, (0, 0), (1, 1)),
    ),
    Problem(
        "burgers", "Burgers", "u_t + u u_x = 0.01/π u_xx on (−1, 1) × (0, 1)", _burgers_points,
        {"u": "", "t": "t", "x": "x", "xx": "xx"}, "xt",
        lambda f, p, d: d["t"] + d["u"] * d["x"] - VISCOSITY * d["xx"], _burgers_ansatz,
        on_grid(_burgers_exact, (-1, 0), (1, 1), (201, 41)),
    ),
    Problem(
        "helmholtz", "Helmholtz, 2D", "Δu + u = q on (−1, 1)², u = sin πx sin 4πy", uniform(1000, (-1, -1), (1, 1)),
        {"u": "", **SECOND}, "xy", _helmholtz, _zero_on_the_square, on_grid(_helmholtz_exact, (-1, -1), (1, 1)),
    ),
    Problem(
        "allen_cahn", "Allen-Cahn", "u_t = 0.001 u_xx + 5 (u − u³), periodic on (−1, 1), t in (0, 1)",
        uniform(1000, (-1, 0), (1, 1)), {"u": "", "t": "t", "xx": "xx"}, "xt",
        lambda f, p, d: d["t"] - INTERFACE * d["xx"] - 5.0 * (d["u"] - d["u"] ** 3), _allen_cahn_ansatz,
        _allen_cahn_exact, _periodic, 3,
    ),
    Problem(
        "poisson_10d", "Poisson, 10D", "Δu = 0 on (0, 1)¹⁰, u = x₁x₂ + x₃x₄ + … + x₉x₁₀ on the boundary", _cube_points,
        None, None, _cube, lambda f, p, h: h, _cube_exact, inputs=DIMENSIONS,
    ),
]  # fmt: skip
