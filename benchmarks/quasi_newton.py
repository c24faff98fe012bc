"""Evaluations of L-BFGS on test problems, compared with SciPy's: `python -m benchmarks.quasi_newton`.

The gradient at the end of our steps is reused at the start of the next one, as in SciPy's. Both have a memory of ten
pairs, and stop at the first evaluation where the largest element of the gradient is at most 1e-5 times the first one.
The counts do not depend on the machine. Prints a table and the median ratio.
"""

import math

import numpy as np

MEMORY, SHARE, MOST = 10, 1e-5, 5000


def rosenbrock(x):
    a, b = x[1:] - x[:-1] ** 2, 1.0 - x[:-1]
    gradient = np.zeros_like(x)
    gradient[:-1] = -400.0 * x[:-1] * a - 2.0 * b
    gradient[1:] += 200.0 * a
    return float(np.sum(100.0 * a**2 + b**2)), gradient


def quadratic(condition):
    def fun(x):
        d = np.geomspace(1.0, condition, len(x))
        return float(0.5 * np.sum(d * (x - 1.0) ** 2)), d * (x - 1.0)

    return fun


def logistic(examples, seed, l2=1e-3):
    rng = np.random.default_rng(seed)

    def fun(w):
        x, y = data(len(w))
        z = y * (x @ w)
        return float(np.mean(np.logaddexp(0.0, -z)) + 0.5 * l2 * w @ w), -x.T @ (y / (1.0 + np.exp(z))) / len(
            y
        ) + l2 * w

    made = {}

    def data(n):
        if n not in made:
            x = rng.normal(size=(examples, n)) * np.geomspace(1.0, 30.0, n)
            made[n] = x, np.sign(x @ rng.normal(size=n) + rng.normal(size=examples))
        return made[n]

    return fun


def powell(x):
    a, b, c, d = x[0::4], x[1::4], x[2::4], x[3::4]
    p, q, r, s = a + 10 * b, c - d, b - 2 * c, a - d
    gradient = np.empty_like(x)
    gradient[0::4] = 2 * p + 40 * s**3
    gradient[1::4] = 20 * p + 4 * r**3
    gradient[2::4] = 10 * q - 8 * r**3
    gradient[3::4] = -10 * q - 40 * s**3
    return float(np.sum(p**2 + 5 * q**2 + r**4 + 10 * s**4)), gradient


def dixon(x):
    i = np.arange(2, len(x) + 1)
    t = 2 * x[1:] ** 2 - x[:-1]
    gradient = np.zeros_like(x)
    gradient[0] = 2 * (x[0] - 1)
    gradient[1:] += 8 * i * t * x[1:]
    gradient[:-1] -= 2 * i * t
    return float((x[0] - 1) ** 2 + np.sum(i * t**2)), gradient


def trid(x):
    gradient = 2 * (x - 1)
    gradient[1:] -= x[:-1]
    gradient[:-1] -= x[1:]
    return float(np.sum((x - 1) ** 2) - np.sum(x[1:] * x[:-1])), gradient


def styblinski(x):
    return float(0.5 * np.sum(x**4 - 16 * x**2 + 5 * x)), 0.5 * (4 * x**3 - 32 * x + 5)


def sum_of_exponentials(x):
    e = np.exp(0.1 * x)
    return float(np.sum(e - 0.1 * x * np.arange(1, len(x) + 1) / len(x))), 0.1 * (e - np.arange(1, len(x) + 1) / len(x))


def least_squares_network(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(60, 3))
    y = np.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2]

    def fun(w):
        a, b, c = w[:24].reshape(3, 8), w[24:32], w[32:40]
        h = np.tanh(x @ a + b)
        r = h @ c + w[40] - y
        dh = np.outer(r, c) * (1 - h**2)
        gradient = np.concatenate([(x.T @ dh).ravel(), dh.sum(0), h.T @ r, [r.sum()]]) * 2 / len(y)
        return float(np.mean(r**2) + 1e-3 * w @ w), gradient + 2e-3 * w

    return fun


def problems():
    """A dict from names to pairs of a function that returns the value and the gradient, and a start."""
    alternating = np.where(np.arange(100) % 2 == 0, -1.2, 1.0)
    draw = np.random.default_rng(0)
    return {
        "Rosenbrock, 2": (rosenbrock, alternating[:2]),
        "Rosenbrock, 10": (rosenbrock, alternating[:10]),
        "Rosenbrock, 100": (rosenbrock, alternating),
        "quadratic, condition 10": (quadratic(10.0), np.zeros(50)),
        "quadratic, condition 1e3": (quadratic(1e3), np.zeros(50)),
        "quadratic, condition 1e4": (quadratic(1e4), np.zeros(200)),
        "logistic, 10": (logistic(200, 1), np.zeros(10)),
        "logistic, 50": (logistic(500, 2), np.zeros(50)),
        "logistic, 100, weakly regularized": (logistic(1000, 3, 1e-5), np.zeros(100)),
        "Powell singular, 4": (powell, np.tile([3.0, -1.0, 0.0, 1.0], 1)),
        "Powell singular, 100": (powell, np.tile([3.0, -1.0, 0.0, 1.0], 25)),
        "Dixon-Price, 10": (dixon, np.ones(10)),
        "Dixon-Price, 50": (dixon, np.full(50, 2.0)),
        "Trid, 20": (trid, np.zeros(20)),
        "Trid, 50": (trid, np.zeros(50)),
        "Styblinski-Tang, 20": (styblinski, draw.uniform(-4, 4, 20)),
        "exponentials, 30": (sum_of_exponentials, np.full(30, 5.0)),
        "network, seed 1": (least_squares_network(1), 0.5 * np.random.default_rng(1).normal(size=41)),
        "network, seed 2": (least_squares_network(2), 0.5 * np.random.default_rng(2).normal(size=41)),
        "network, seed 3": (least_squares_network(3), 0.5 * np.random.default_rng(3).normal(size=41)),
    }


class Reached(Exception):
    """Enough of the gradient has vanished."""


class Counted:
    """A function that counts its evaluations, and ends at the first point where the gradient is small."""

    def __init__(self, fun, start):
        self._fun, self.count = fun, 0
        self._limit = SHARE * np.abs(fun(start)[1]).max()

    def __call__(self, x):
        self.count += 1
        value, gradient = self._fun(np.asarray(x, "float64"))
        if np.abs(gradient).max() <= self._limit:
            raise Reached
        return value, gradient


def of_scipy(fun, start):
    from scipy.optimize import minimize

    counted = Counted(fun, start)
    options = {"maxcor": MEMORY, "maxiter": MOST, "maxfun": MOST, "ftol": 0.0, "gtol": 0.0}
    try:
        minimize(counted, start, jac=True, method="L-BFGS-B", options=options)
    except Reached:
        return counted.count
    return math.nan


def of_ours(fun, start):
    """The steps of `kg.optimizers.LBFGS`. The gradient at the end of a step is that at the start of the next one."""
    import keras

    from keras_gradtools.curvature.operators.trials import Trials
    from keras_gradtools.optimizers import LBFGS

    class Operator:
        dtype = "float64"
        shape = (len(start), len(start))

        def __init__(self):
            self.x, self.known = start.copy(), {}
            self.variables = [keras.Variable(start, dtype="float64")]

        def loss_state(self):
            return None

        def trials(self):
            return Trials(lambda step: (self.at(keras.ops.convert_to_numpy(step)), 1), len(start), "float64")

        def at(self, step):
            x = self.x + step
            key = x.tobytes()
            if key not in self.known:
                self.known = {**dict(list(self.known.items())[-30:]), key: counted(x)}
            return self.known[key]

    counted, optimizer = Counted(fun, start), LBFGS(memory=MEMORY)
    operator, optimizer.has_trainer = Operator(), True
    optimizer.build(operator.variables)
    try:
        while counted.count < MOST:
            found = optimizer.take_step(operator, None)
            optimizer.assign_end(*optimizer.at_end())
            optimizer.end_step(operator, 0.0)
            if found.step is not None:
                operator.x = operator.x + found.step
            elif optimizer.approximation().is_initial and found.attempts == optimizer.max_evaluations:
                return math.nan
    except Reached:
        return counted.count
    return math.nan


def main():
    ratios, counts = [], np.zeros(2)
    print(f"{'problem':36}{'SciPy':>8}{'LBFGS':>8}{'ratio':>8}")
    for name, (fun, start) in problems().items():
        theirs, ours = of_scipy(fun, start), of_ours(fun, start)
        ratios.append(ours / theirs)
        counts += (theirs, ours)
        print(f"{name:36}{theirs:8}{ours:8}{ratios[-1]:8.2f}")
    low, median, high = np.quantile(ratios, (0.1, 0.5, 0.9))
    print(f"{'all':36}{counts[0]:8.0f}{counts[1]:8.0f}{counts[1] / counts[0]:8.2f}")
    print(f"median ratio {median:.2f}, a tenth below {low:.2f}, a tenth above {high:.2f}, {len(ratios)} problems")


if __name__ == "__main__":
    main()
