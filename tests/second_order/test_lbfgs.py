"""L-BFGS: exact on quadratics, close to SciPy on others, and resumed bit for bit."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_gradtools as kg
from keras_gradtools.models import SecondOrder
from keras_gradtools.optimizers import LBFGS, StepReason
from keras_gradtools.second_order.lbfgs import Pairs

RNG = np.random.default_rng(2)
X = RNG.normal(size=(40, 3)).astype("float32")
T = np.sin(2.0 * X[:, :1]) + X[:, 1:2] * X[:, 2:]


def network(units=6):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(units, "tanh"), layers.Dense(1)])
    draw = np.random.default_rng(1)
    model.set_weights([0.5 * draw.normal(size=w.shape).astype("float32") for w in model.get_weights()])
    return model


def trainer_of(model, optimizer=None, loss="mse", **kwargs):
    trainer = SecondOrder(model, **kwargs)
    trainer.compile(optimizer or LBFGS(), loss)
    return trainer


def fit(trainer, epochs, x=X, y=T):
    return trainer.fit(x, y, batch_size=len(x), epochs=epochs, shuffle=False, verbose=0).history


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
        fit(trainer_of(model), 25)
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
        history = fit(trainer_of(model), 31)["loss"]
        assert all(np.diff(history) <= 0.0)
        assert history[-1] <= 1.5 * reference.fun and reference.fun < 0.5 * history[0]

    def test_an_update_keeps_the_newest_pairs(self):
        trainer = trainer_of(network(), LBFGS(memory=2))
        fit(trainer, 4)
        steps = np.asarray(keras.ops.convert_to_numpy(trainer.optimizer._steps))
        assert steps.shape == (2, 31) and np.all(np.linalg.norm(steps, axis=1) > 0)
        np.testing.assert_array_equal(steps[0], trainer.last_step.step)

    def test_logs(self):
        history = fit(trainer_of(network()), 3)
        assert history["step_reason"] == [0, 0, 0] and min(history["step_length"]) > 0
        assert np.isfinite(history["ratio"]).all()

    def test_save_and_resume(self, tmp_path):
        trainer, other = trainer_of(network()), trainer_of(network())
        fit(trainer, 6)
        fit(other, 3)
        other.save(tmp_path / "other.keras")
        other = keras.models.load_model(tmp_path / "other.keras")
        fit(other, 3)
        for a, b in zip(trainer.model.get_weights(), other.model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_a_layer_frozen_after_building(self):
        model = network()
        trainer = trainer_of(model)
        fit(trainer, 2)
        model.layers[0].trainable = False
        trainer.compile(trainer.optimizer, "mse")
        kernel = model.layers[0].get_weights()[0]
        history = fit(trainer, 2)["loss"]
        assert history[1] <= history[0]
        np.testing.assert_array_equal(model.layers[0].get_weights()[0], kernel)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 4])
def test_random_classifiers_go_down_until_the_gradient_vanishes(classes):
    options = {"kernel_regularizer": "l2", "bias_regularizer": "l2"}
    model = keras.Sequential([keras.Input((3,)), layers.Dense(5, "tanh", **options), layers.Dense(classes, **options)])
    trainer = trainer_of(model, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    for seed in range(10):
        draw = np.random.default_rng(seed)
        model.set_weights([draw.normal(size=w.shape).astype("float32") for w in model.get_weights()])
        y = draw.integers(0, classes, len(X)).astype("int32")
        history = fit(trainer, 200, y=y)
        losses = np.array(history["loss"])
        # Up to rounding, which hides the decrease of the last steps.
        assert np.all(np.diff(losses) <= 16 * 2.0**-23 * losses[:-1]) and min(history["gradient_norm"]) < 1e-5


class TestNoStep:
    def test_at_a_minimum(self):
        model = network()
        y = keras.ops.convert_to_numpy(model(X))
        trainer = trainer_of(model)
        fit(trainer, 1, y=y)
        # The gradient is zero, or rounding noise along which the loss may go up or down.
        assert trainer.last_step.reason != StepReason.NOT_FINITE
        np.testing.assert_allclose(keras.ops.convert_to_numpy(model(X)), y, atol=1e-5)

    def test_no_step_that_lowers_the_loss(self):
        # The loss is 50 w^2, and the only step that is tried leads from 0.005 to -0.495.
        model = keras.Sequential([keras.Input((1,)), layers.Dense(1, use_bias=False)])
        model.set_weights([np.array([[0.005]], "float32")])
        trainer = trainer_of(model, LBFGS(max_evaluations=1), loss=lambda y, z: 50.0 * z**2)
        fit(trainer, 1, np.ones((1, 1), "float32"), np.zeros((1, 1), "float32"))
        assert trainer.last_step.reason == StepReason.REJECTED
        assert "none of 1 step lengths" in trainer.last_step.message
        np.testing.assert_array_equal(model.get_weights()[0], np.array([[0.005]], "float32"))

    def test_infinity(self):
        model = network()
        before = model.get_weights()
        trainer = trainer_of(model, loss=lambda y, z: keras.ops.log(-1.0 - z**2))
        with pytest.warns(UserWarning, match="SecondOrder took no step"):
            fit(trainer, 1)
        assert trainer.last_step.reason == StepReason.NOT_FINITE
        for a, b in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("options", [{"memory": 0}, {"max_evaluations": 0}, {"learning_rate": 2.0}])
def test_options(options):
    with pytest.raises(ValueError, match=f"LBFGS expects .*`{next(iter(options))}`"):
        LBFGS(**options)


def test_config():
    config = LBFGS(memory=3, max_evaluations=7, learning_rate=0.5, name="mine").get_config()
    assert LBFGS.from_config(config).get_config() == config
    assert (config["memory"], config["max_evaluations"], config["name"]) == (3, 7, "mine")
