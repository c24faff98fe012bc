"""L-BFGS: its directions and its state, least squares, and as good as the method of SciPy."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_gradtools as kg
from keras_gradtools import backend
from keras_gradtools.optimizers import LBFGS, StepReason
from keras_gradtools.second_order.quasi_newton import Pair
from tests.second_order.tanh_network import RNG, T, X, assert_same_weights, fit, network, trainer_of


def array(variable):
    return np.array(keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(variable)))


def rows_of(rows):
    return np.concatenate([array(v) for v in rows.blocks])


def values(pairs, places):
    return [rows_of(pairs.steps)[places], rows_of(pairs.changes)[places], array(pairs.products), array(pairs.place)]


def used_places(pairs):
    """Those of a memory of two that the next pair does not overwrite."""
    return [i for i in range(3) if i != (pairs.current().newest + 1) % 3]


@pytest.fixture(params=["blocks of two rows", "a block for each row"])
def blocks(request, monkeypatch):
    most = {"blocks of two rows": 2 * 5, "a block for each row": 1}
    monkeypatch.setattr("keras_gradtools.second_order.stored_pairs._MOST_COPIED", most[request.param])


def built(n, memory=10, dtype="float32"):
    """An `LBFGS` for n weights."""
    optimizer = LBFGS(memory)
    optimizer.has_trainer = True
    optimizer.build([keras.Variable(np.zeros(n), dtype=dtype)])
    return optimizer


def store(optimizer, step, change):
    """Stores a pair as a step does: after a descent, which computes the products of the former pairs."""
    approximation = optimizer.approximation()
    if not approximation.is_initial:
        _, _, approximation = approximation.descent(keras.ops.convert_to_tensor(np.ones_like(step)))
    pair = Pair(step, change, 1.0, float(step @ change), float(np.linalg.norm(step) * np.linalg.norm(change)))
    optimizer.store(approximation.updated(pair))


def bfgs_matrix(steps, changes):
    """Of pairs in rows, the oldest first."""
    n = steps.shape[1]
    matrix = np.eye(n) * (steps[-1] @ changes[-1]) / (changes[-1] @ changes[-1])
    for s, y in zip(steps, changes, strict=True):
        rho = 1.0 / (s @ y)
        left = np.eye(n) - rho * np.outer(s, y)
        matrix = left @ matrix @ left.T + rho * np.outer(s, s)
    return matrix


def pairs_of_a_quadratic(count, n, dtype):
    steps = RNG.normal(size=(count, n))
    root = RNG.normal(size=(n, n))
    return steps.astype(dtype), (steps @ (root @ root.T + np.eye(n))).astype(dtype)


@pytest.mark.float64
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_the_direction_is_that_of_the_bfgs_matrix(count, dtype):
    # With a memory of 4, the pairs fill the ring, and then overwrite it more than once.
    n, optimizer = 5, built(5, memory=4, dtype=dtype)
    steps, changes = pairs_of_a_quadratic(count, n, dtype)
    for s, y in zip(steps, changes, strict=True):
        store(optimizer, s, y)
    matrix = bfgs_matrix(steps[-4:].astype("float64"), changes[-4:].astype("float64"))
    gradient = RNG.normal(size=n).astype(dtype)
    direction, slope, _ = optimizer.approximation().descent(keras.ops.convert_to_tensor(gradient))
    direction = keras.ops.convert_to_numpy(direction)
    assert direction.dtype == dtype
    # Products in double precision: only the direction itself is rounded.
    tolerance = 1e-6 if dtype == "float32" else 1e-9
    np.testing.assert_allclose(direction, -matrix @ gradient, rtol=0, atol=tolerance * np.abs(matrix @ gradient).max())
    np.testing.assert_allclose(slope, direction.astype("float64") @ gradient, rtol=1e-6)


@pytest.mark.usefixtures("blocks")
def test_the_pairs_in_blocks():
    test_the_direction_is_that_of_the_bfgs_matrix(9, "float32")


def test_long_vectors(monkeypatch):
    monkeypatch.setattr(type(backend._current), "LONG", 10)
    n, optimizer = 5000, built(5000, memory=3)
    steps = RNG.normal(size=(5, n)).astype("float32")
    changes = (steps * np.geomspace(1.0, 5.0, n)).astype("float32")
    for s, y in zip(steps, changes, strict=True):
        store(optimizer, s, y)
    gradient = RNG.normal(size=n).astype("float32")
    direction, _, _ = optimizer.approximation().descent(keras.ops.convert_to_tensor(gradient))
    expected = -bfgs_matrix(steps[-3:].astype("float64"), changes[-3:].astype("float64")) @ gradient
    np.testing.assert_allclose(keras.ops.convert_to_numpy(direction), expected, rtol=0, atol=1e-5)


class TestTheState:
    def test_another_memory(self):
        steps, changes = pairs_of_a_quadratic(3, 5, "float32")
        first, second = built(5, memory=4), built(5, memory=2)
        for s, y in zip(steps, changes, strict=True):
            store(first, s, y)
        first.iterations.assign(7)
        with pytest.warns(UserWarning, match="LBFGS starts without the curvature of earlier steps"):
            second.load_own_variables({str(i): x for i, x in enumerate(map(array, first.variables))})
        assert second.approximation().is_initial and int(array(second.iterations)) == 7

    def test_a_step_that_is_interrupted_at_its_end(self):
        trainer, other = (trainer_of(network(), LBFGS(memory=2)) for _ in range(2))
        fit(trainer, 4)
        fit(other, 5)
        optimizer, weights = trainer.optimizer, trainer.model.get_weights()
        before = values(optimizer._pairs, used_places(optimizer._pairs))
        ends, assigned = trainer._problem._ends, []

        def interrupted(*args):
            ends[1](*args)
            assigned.append(int(array(optimizer.iterations)))
            raise KeyboardInterrupt

        trainer._problem._ends = [interrupted, interrupted]
        with pytest.raises(KeyboardInterrupt):
            trainer.train_on_batch(X, T)
        trainer._problem._ends = ends
        assert int(array(optimizer.iterations)) == 4 and assigned == [5]
        assert_same_weights(trainer.model, weights)
        for a, b in zip(before, values(optimizer._pairs, used_places(optimizer._pairs)), strict=True):
            np.testing.assert_array_equal(a, b)
        trainer.train_on_batch(X, T)
        assert_same_weights(trainer.model, other.model.get_weights())

    @pytest.mark.parametrize("last", ["steps", "changes", "products", "place"])
    def test_an_interrupted_step_leaves_the_pairs_of_the_last_one(self, last, monkeypatch):
        # With pairs that are stored one by one, as those of large models are.
        monkeypatch.setattr("keras_gradtools.second_order.stored_pairs._MOST_COPIED", 1)
        trainer = trainer_of(network(), LBFGS(memory=2))
        fit(trainer, 4)
        optimizer, weights = trainer.optimizer, trainer.model.get_weights()
        pairs = optimizer._pairs
        used = used_places(pairs)
        before = values(pairs, used)
        found = getattr(pairs, last)
        variables = {id(v) for v in getattr(found, "blocks", [found])}
        assign = keras.Variable.assign

        def interrupted(self, value):
            assign(self, value)
            if id(self) in variables:
                variables.clear()
                raise KeyboardInterrupt

        monkeypatch.setattr(keras.Variable, "assign", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.train_on_batch(X, T)
        monkeypatch.undo()
        assert_same_weights(trainer.model, weights)
        for a, b in zip(before, values(pairs, used), strict=True):
            np.testing.assert_array_equal(a, b)


class TestFit:
    def test_small_and_large_models_take_the_same_steps(self, monkeypatch):
        # The direction of a small model is a part of the program of a trial.
        small = fit(trainer_of(network(), LBFGS(memory=3)), 8)["loss"]
        monkeypatch.setattr("keras_gradtools.second_order.stored_pairs._MOST_COPIED", 1)
        large = fit(trainer_of(network(), LBFGS(memory=3)), 8)["loss"]
        np.testing.assert_allclose(small, large, rtol=1e-4)

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
        pairs = trainer.optimizer.approximation()
        assert pairs.number == 2
        assert rows_of(pairs.stored.steps).shape == (3, 31)
        np.testing.assert_array_equal(rows_of(pairs.stored.steps)[pairs.newest], trainer.last_step.step)


def test_at_a_minimum():
    model = network()
    y = keras.ops.convert_to_numpy(model(X))
    trainer = trainer_of(model, LBFGS())
    fit(trainer, 1, y=y)
    # The gradient is zero, or rounding noise along which the loss may go up or down.
    assert trainer.last_step.reason != StepReason.NOT_FINITE
    np.testing.assert_allclose(keras.ops.convert_to_numpy(model(X)), y, atol=1e-5)
