"""BFGS and its self-scaled variants: the secant equation, the matrices of SciPy, and quadratics."""

import keras
import numpy as np
import pytest

from keras_gradtools.curvature.operators.trials import Trials
from keras_gradtools.optimizers import BFGS, LBFGS, StepReason
from keras_gradtools.second_order.broyden_family import UPDATES, scaling_and_share, update_terms
from keras_gradtools.second_order.line_search import LineSearchResult
from keras_gradtools.second_order.quasi_newton import Pair
from tests.second_order.tanh_network import RNG, T, X, fit, network, trainer_of


def dense(optimizer):
    approximation = optimizer.approximation()
    return np.stack([approximation.times(row) for row in np.eye(approximation.size)], axis=1)


def build(optimizer, size):
    """Builds the optimizer for a variable in double precision, and returns a list of it."""
    variables = [keras.Variable(np.zeros(size), dtype="float64")]
    optimizer.has_trainer = True
    optimizer.build(variables)
    return variables


def store(optimizer, pair):
    optimizer.store(optimizer.approximation().updated(pair))


def rosenbrock(x):
    a, b = x[1:] - x[:-1] ** 2, 1.0 - x[:-1]
    gradient = np.zeros_like(x)
    gradient[:-1] = -400.0 * x[:-1] * a - 2.0 * b
    gradient[1:] += 200.0 * a
    return float(np.sum(100.0 * a**2 + b**2)), gradient


class OnFunction:
    """The operator of a function of a vector, as `take_step` uses it, for which it builds the optimizer."""

    dtype = "float64"

    def __init__(self, optimizer, fun, x):
        self.fun, self.x, self.shape = fun, np.array(x, "float64"), (len(x), len(x))
        self.variables = build(optimizer, len(x))

    def loss_state(self):
        return None

    def trials(self):
        return Trials(lambda step: (self.fun(self.x + keras.ops.convert_to_numpy(step)), 1), len(self.x), "float64")


def pair_of(step, change, former_curvature):
    length = np.linalg.norm(step) * np.linalg.norm(change)
    return Pair(step, change, former_curvature, float(step @ change), float(length))


def run(optimizer, operator, steps, gradient_norm=0.0):
    for _ in range(steps):
        found = optimizer.take_step(operator, None)
        if found.gradient_norm <= gradient_norm or found.step is None:
            break
        operator.x = operator.x + found.step
        optimizer.store(optimizer.now.pending)
    return found


@pytest.mark.float64
class TestTheMatrix:
    @pytest.mark.parametrize("update", UPDATES)
    @pytest.mark.parametrize("scales_first", [False, True])
    def test_the_secant_equation_symmetry_and_positive_definiteness(self, update, scales_first):
        n, draw = 6, np.random.default_rng(3)
        root = draw.normal(size=(n, n))
        hessian = root @ root.T + 0.1 * np.eye(n)
        optimizer = BFGS(update, scales_first)
        build(optimizer, n)
        for _ in range(20):
            gradient = draw.normal(size=n)
            t = draw.uniform(0.1, 2.0)
            step = -t * optimizer.approximation().times(gradient)
            pair = pair_of(step, hessian @ step, -t * (step @ gradient))
            # s'Bs with the inverse of H.
            np.testing.assert_allclose(pair.former_curvature, step @ np.linalg.solve(dense(optimizer), step), rtol=1e-6)
            store(optimizer, pair)
            matrix = keras.ops.convert_to_numpy(optimizer.approximation().matrix)
            np.testing.assert_allclose(matrix @ pair.change, step, rtol=0, atol=1e-9 * np.abs(step).max())
            np.testing.assert_array_equal(matrix, matrix.T)
            assert np.linalg.eigvalsh(matrix).min() > 0.0

    def test_the_matrices_and_directions_of_scipy(self):
        minimize = pytest.importorskip("scipy.optimize").minimize
        start = np.array([-1.2, 1.0, 0.5, 2.0])
        optimizer, old = BFGS(), start
        build(optimizer, 4)
        for k in range(1, 13):
            theirs = minimize(rosenbrock, start, jac=True, method="BFGS", options={"maxiter": k, "gtol": 0.0})
            step = theirs.x - old
            before, after = rosenbrock(old)[1], rosenbrock(theirs.x)[1]
            direction = -optimizer.approximation().times(before)
            cosine = direction @ step / np.linalg.norm(direction) / np.linalg.norm(step)
            assert cosine > 1.0 - 1e-10
            t = np.linalg.norm(step) / np.linalg.norm(direction)
            store(optimizer, pair_of(step, after - before, -t * (step @ before)))
            np.testing.assert_allclose(dense(optimizer), theirs.hess_inv, rtol=1e-5, atol=1e-7)
            old = theirs.x

    def test_dfp_and_bfgs_are_members_of_the_family(self):
        n, draw = 4, np.random.default_rng(5)
        root = draw.normal(size=(n, n))
        h, s = root @ root.T, draw.normal(size=n)
        y = np.linalg.solve(h, s) + 0.3 * s
        rho = 1.0 / (s @ y)
        left = np.eye(n) - rho * np.outer(s, y)
        bfgs = left @ h @ left.T + rho * np.outer(s, s)
        image = h @ y
        dfp = h - np.outer(image, image) / (y @ image) + rho * np.outer(s, s)
        pair_columns = np.stack([s, image], axis=1)
        for phi, expected in ((1.0, bfgs), (0.0, dfp), (0.3, 0.3 * bfgs + 0.7 * dfp)):
            terms = np.array(update_terms(1.0, phi, s @ y, (y @ image) * rho))
            np.testing.assert_allclose(h + pair_columns @ terms @ pair_columns.T, expected, rtol=1e-9, atol=1e-9)

    def test_the_first_scaling_is_that_of_nocedal_and_wright(self):
        s, y = np.array([1.0, 2.0, 0.5]), np.array([3.0, 5.0, 4.0])
        optimizer = BFGS(scales_first=True)
        build(optimizer, 3)
        store(optimizer, pair_of(s, y, s @ s))
        start = np.eye(3) * (s @ y) / (y @ y)
        left = np.eye(3) - np.outer(s, y) / (s @ y)
        np.testing.assert_allclose(dense(optimizer), left @ start @ left.T + np.outer(s, s) / (s @ y), rtol=1e-12)


class TestTheFormulas:
    @pytest.mark.parametrize("b", [0.1, 0.7, 1.0, 1.5, 30.0])
    @pytest.mark.parametrize("excess", [0.0, 1e-12, 0.2, 50.0])
    def test_ssbroyden_is_that_of_al_baali(self, b, excess):
        n, h = 10, (1.0 + excess) / b
        tau, phi = scaling_and_share("ssbroyden", n, b, h, False)
        a = b * h - 1.0
        if a > 1e-9:
            c = np.sqrt(a / (1 + a))
            rho = min(1.0, h * (1 - c))
            theta = max((rho - 1) / a, min(1 / rho, (1 - b) / b))
            sigma = 1 + a * theta
            root = sigma ** (1 / (1 - n))
            limit = min(1.0, 1.0 / b)
            expected = min(limit * root, sigma) if theta <= 0 else limit * min(root, 1 / theta)
            np.testing.assert_allclose((tau, phi), (expected, (1 - theta) / sigma), rtol=1e-8)
        assert np.isfinite([tau, phi]).all() and tau > 0.0

    def test_ssbfgs_only_shrinks_the_curvature(self):
        assert scaling_and_share("ssbfgs", 5, 4.0, 2.0, False) == (0.25, 1.0)
        assert scaling_and_share("ssbfgs", 5, 0.5, 3.0, False) == (1.0, 1.0)
        assert scaling_and_share("bfgs", 5, 4.0, 2.0, False) == (1.0, 1.0)

    def test_one_weight(self):
        tau, phi = scaling_and_share("ssbroyden", 1, 2.0, 0.5, False)
        assert np.isfinite([tau, phi]).all()


@pytest.mark.float64
@pytest.mark.parametrize("update", UPDATES)
class TestFunctions:
    def test_rosenbrock(self, update):
        optimizer = BFGS(update)
        operator = OnFunction(optimizer, rosenbrock, np.tile([-1.2, 1.0], 5))
        found = run(optimizer, operator, 200, 1e-8)
        assert found.gradient_norm <= 1e-8
        np.testing.assert_allclose(operator.x, 1.0, rtol=1e-7)

    def test_a_quadratic_ends_in_n_steps_with_exact_searches(self, update, monkeypatch):
        n = 6
        d = np.geomspace(1.0, 100.0, n)
        optimizer = BFGS(update)
        operator = OnFunction(optimizer, lambda x: (0.5 * float(np.sum(d * x**2)), d * x), RNG.normal(size=n))

        def exact(evaluate, start, step, most, epsilon):
            trial = evaluate(1.0)
            t = start.slope / (start.slope - trial.slope)
            return LineSearchResult(evaluate(t), 2, True)

        monkeypatch.setattr("keras_gradtools.second_order.quasi_newton.line_search", exact)
        size = np.linalg.norm(d * operator.x)
        run(optimizer, operator, n)
        assert np.linalg.norm(d * operator.x) < 1e-9 * size
        if update == "bfgs":
            # After n exact steps, the matrix is the inverse Hessian.
            np.testing.assert_allclose(dense(optimizer), np.diag(1.0 / d), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("update", UPDATES)
class TestFit:
    def test_never_raises_the_loss_and_goes_further_than_lbfgs(self, update):
        history = fit(trainer_of(network(), BFGS(update)), 60)["loss"]
        assert np.all(np.diff(history) <= 16 * 2.0**-23 * np.array(history[:-1]))
        assert history[-1] < 1.2 * fit(trainer_of(network(), LBFGS()), 60)["loss"][-1] < 0.1 * history[0]


@pytest.mark.float64
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_matrix_has_the_precision_of_the_weights(dtype):
    trainer = trainer_of(network(dtype=dtype), BFGS())
    fit(trainer, 2, X.astype(dtype), T.astype(dtype))
    assert trainer.last_step.step.dtype == dtype
    assert keras.backend.standardize_dtype(trainer.optimizer._matrix.dtype) == dtype


@pytest.mark.float64
def test_a_rejected_step_makes_the_matrix_the_identity():
    optimizer = BFGS()
    operator = OnFunction(optimizer, rosenbrock, [-1.2, 1.0])
    run(optimizer, operator, 5)
    assert not optimizer.approximation().is_initial
    operator.fun = lambda x: (np.inf if np.any(x != operator.x) else 1.0, np.ones(2))
    assert optimizer.take_step(operator, None).reason == StepReason.REJECTED
    optimizer.store(optimizer.now.pending)
    assert optimizer.approximation().is_initial


def test_too_many_weights():
    trainer = trainer_of(network(), BFGS(max_weights=30))
    with pytest.raises(
        ValueError, match=r"BFGS expects a model of at most max_weights=30 weights.*Received: 31 .*LBFGS"
    ):
        fit(trainer, 1)
