"""L-BFGS: the two loops, least squares, and as good as the method of SciPy."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_gradtools as kg
from keras_gradtools.optimizers import LBFGS, StepReason
from keras_gradtools.second_order.lbfgs import Pairs
from tests.second_order.tanh_network import RNG, T, X, fit, network, trainer_of


def test_the_two_loops_multiply_by_the_bfgs_matrix():
    n, steps = 5, RNG.normal(size=(3, 5))
    changes = steps @ (lambda a: a @ a.T + np.eye(n))(RNG.normal(size=(n, n)))
    matrix = np.eye(n) * (steps[0] @ changes[0]) / (changes[0] @ changes[0])
    for s, y in zip(steps[::-1], changes[::-1], strict=True):  # the oldest first
        rho = 1.0 / (s @ y)
        left = np.eye(n) - rho * np.outer(s, y)
        matrix = left @ matrix @ left.T + rho * np.outer(s, s)
    v = RNG.normal(size=n)
    np.testing.assert_allclose(Pairs(steps, changes, 10).times(v), matrix @ v, rtol=1e-8)
    np.testing.assert_allclose(Pairs(steps, changes, 10).initial().times(v), v)


class TestFit:
    def test_linear_least_squares(self):
        model = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
        fit(trainer_of(model, LBFGS()), 25)
        columns = np.concatenate([X, np.ones((len(X), 1))], axis=1).astype("float64")
        expected = np.linalg.lstsq(columns, T.astype("float64"), rcond=None)[0]
        kernel, bias = model.get_weights()
        np.testing.assert_allclose(np.append(kernel[:, 0], bias), expected[:, 0], rtol=1e-3, atol=1e-4)

    def test_never_raises_the_loss_and_is_no_worse_than_scipy(self):
        minimize = pytest.importorskip("scipy.optimize").minimize
        model = network()
        hessian = kg.curvature.Hessian(model, "mse", (X, T))

        def fun(offset):
            loss, gradient = hessian.loss_and_gradient(offset.astype("float32"))
            return loss, gradient.astype("float64")

        start = np.zeros(hessian.shape[0])
        reference = minimize(fun, start, jac=True, method="L-BFGS-B", options={"maxiter": 30, "maxcor": 10})
        history = fit(trainer_of(model, LBFGS()), 31)["loss"]
        assert all(np.diff(history) <= 0.0)
        assert history[-1] <= 1.5 * reference.fun and reference.fun < 0.5 * history[0]

    def test_an_update_keeps_the_newest_pairs(self):
        trainer = trainer_of(network(), LBFGS(memory=2))
        fit(trainer, 4)
        steps = np.asarray(keras.ops.convert_to_numpy(trainer.optimizer._steps))
        assert steps.shape == (2, 31) and np.all(np.linalg.norm(steps, axis=1) > 0)
        np.testing.assert_array_equal(steps[0], trainer.last_step.step)


def test_at_a_minimum():
    model = network()
    y = keras.ops.convert_to_numpy(model(X))
    trainer = trainer_of(model, LBFGS())
    fit(trainer, 1, y=y)
    # The gradient is zero, or rounding noise along which the loss may go up or down.
    assert trainer.last_step.reason != StepReason.NOT_FINITE
    np.testing.assert_allclose(keras.ops.convert_to_numpy(model(X)), y, atol=1e-5)
