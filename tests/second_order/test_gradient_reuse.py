"""Quasi-Newton steps reuse the gradient at the end of the last step, but only if nothing else has changed."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_gradtools.curvature.data.data_sums import DataSums
from keras_gradtools.curvature.operators.trials import Trials
from keras_gradtools.keras_state.layer_state import set_keras_mask
from keras_gradtools.models import SecondOrder
from keras_gradtools.optimizers import BFGS, LBFGS

RNG = np.random.default_rng(2)
X = RNG.normal(size=(40, 3)).astype("float32")
T = np.sin(2.0 * X[:, :1]) + X[:, 1:2] * X[:, 2:]


@pytest.fixture(autouse=True)
def starts(monkeypatch):
    """The starts of steps that were evaluated."""
    found, compute = [], Trials.start

    def counted(self, *args):
        found.append(compute(self, *args))
        return found[-1]

    monkeypatch.setattr(Trials, "start", counted)
    return found


def trainer_of(*parts, loss="mse", optimizer=None):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(6, "tanh"), *parts, layers.Dense(1)])
    draw = np.random.default_rng(1)
    for v in model.trainable_variables:
        v.assign(0.5 * draw.normal(size=v.shape))
    trainer = SecondOrder(model)
    trainer.compile(optimizer or LBFGS(), loss)
    return trainer


def steps(trainer, count, x=X, y=T, weights=None):
    return [trainer.train_on_batch(x, y, weights) for _ in range(count)]


@pytest.mark.parametrize("optimizer", [LBFGS, BFGS])
def test_one_start_is_evaluated_and_the_steps_keep_their_bits(optimizer, starts, monkeypatch):
    trainer = trainer_of(optimizer=optimizer())
    losses = steps(trainer, 8)
    assert len(starts) == 1
    monkeypatch.setattr(DataSums, "loss_state", lambda self: None)
    again = trainer_of(optimizer=optimizer())
    assert steps(again, 8) == losses
    assert len(starts) == 9
    for a, b in zip(trainer.model.get_weights(), again.model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def last_loss_is_that_of(trainer, x, y, loss):
    expected = np.mean(ops.convert_to_numpy(loss(ops.convert_to_tensor(y), trainer.model(x))))
    steps(trainer, 1, x, y)
    np.testing.assert_allclose(trainer.last_step.loss, expected, rtol=1e-5)


def squares(y, z):
    return (z - y) ** 2


class TestWhatChanges:
    def test_the_batch(self, starts):
        trainer = trainer_of(loss=squares)
        steps(trainer, 2)
        last_loss_is_that_of(trainer, X, T + 1.0, squares)
        assert len(starts) == 2

    def test_an_array_that_is_overwritten(self, starts):
        trainer = trainer_of(loss=squares)
        y = ops.convert_to_tensor(T.copy())
        steps(trainer, 2, ops.convert_to_tensor(X), y)
        y += 1.0  # in place on torch
        last_loss_is_that_of(trainer, ops.convert_to_tensor(X), y, squares)
        assert len(starts) == 2

    def test_sample_weights(self, starts):
        trainer = trainer_of()
        steps(trainer, 2, weights=np.ones(40, "float32"))
        steps(trainer, 1, weights=np.linspace(0, 1, 40, dtype="float32"))
        assert len(starts) == 2

    def test_the_weights(self, starts):
        trainer = trainer_of(loss=squares)
        steps(trainer, 2)
        trainer.model.layers[-1].bias.assign_add([0.5])
        last_loss_is_that_of(trainer, X, T, squares)
        assert len(starts) == 2

    def test_a_variable_that_only_the_loss_reads(self, starts):
        factor = keras.Variable(1.0, trainable=False)

        def loss(y, z):
            return factor * (z - y) ** 2

        trainer = trainer_of(loss=loss)
        steps(trainer, 2)
        factor.assign(3.0)
        last_loss_is_that_of(trainer, X, T, loss)
        assert len(starts) == 2

    def test_an_attribute_of_a_layer(self, starts):
        class Scaled(layers.Layer):
            factor = 1.0

            def call(self, x):
                return self.factor * x

        layer = Scaled()
        trainer = trainer_of(layer, loss=squares)
        steps(trainer, 2)
        layer.factor = 0.5
        last_loss_is_that_of(trainer, X, T, squares)
        assert len(starts) == 2

    def test_the_loss(self, starts):
        trainer = trainer_of(loss=squares)
        steps(trainer, 2)
        trainer.compile(trainer.optimizer, lambda y, z: 2.0 * (z - y) ** 2)
        last_loss_is_that_of(trainer, X, T, lambda y, z: 2.0 * (z - y) ** 2)
        assert len(starts) == 2

    def test_dropout_masks(self, starts):
        trainer = trainer_of(layers.Dropout(0.2, seed=1))
        steps(trainer, 4)
        assert len(starts) == 4

    def test_statistics(self, starts):
        trainer = trainer_of(layers.BatchNormalization())
        steps(trainer, 3)
        moved = trainer.model.layers[1].get_weights()[2]
        assert np.any(moved != 0.0) and len(starts) in (1, 3)


@pytest.mark.parametrize("optimizer", [LBFGS, BFGS])
def test_an_evaluation_between_two_steps(optimizer):
    """On JAX, Keras' `evaluate` deletes the arrays of the weights that it was given."""
    losses = {}
    for evaluates in (False, True):
        trainer = trainer_of(optimizer=optimizer())
        found = steps(trainer, 2)
        if evaluates:
            trainer.evaluate(X, T, verbose=0)
        losses[evaluates] = found + steps(trainer, 2)
    np.testing.assert_allclose(losses[True], losses[False], rtol=1e-5)
    data = {"batch_size": len(X), "shuffle": False, "epochs": 3, "verbose": 0}
    history = trainer_of(optimizer=optimizer()).fit(X, T, validation_data=(X, T), **data)
    np.testing.assert_allclose(history.history["val_loss"][0], history.history["loss"][1], rtol=1e-5)


@pytest.mark.parametrize("optimizer", [LBFGS, BFGS])
def test_a_mask_of_keras_that_only_the_second_batch_has(optimizer):
    x = np.random.default_rng(3).normal(size=(8, 4, 3)).astype("float32")
    y = np.ones((8, 1), "float32")

    def trained(first):
        model = keras.Sequential([keras.Input((4, 3)), layers.GlobalAveragePooling1D(), layers.Dense(1)])
        trainer = SecondOrder(model)
        trainer.compile(optimizer(), "mse")
        weights = [np.full(w.shape, 0.3, "float32") for w in model.get_weights()]
        if first:
            steps(trainer, 2, x, y)
        model.set_weights(weights)
        masked = ops.convert_to_tensor(x)
        set_keras_mask(masked, ops.convert_to_tensor(np.arange(4) < 2 * np.ones((8, 1))))
        logs = trainer.train_on_batch(masked, y, return_dict=True)
        return logs["loss"], logs["gradient_norm"]

    np.testing.assert_allclose(trained(True), trained(False), rtol=1e-6)
