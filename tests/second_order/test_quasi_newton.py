"""What L-BFGS and the members of the BFGS family have in common: resuming bit for bit, and steps that are not taken."""

import functools

import keras
import numpy as np
import pytest
from keras import layers

from keras_gradtools.optimizers import BFGS, LBFGS, StepReason
from keras_gradtools.second_order.broyden_family import UPDATES
from tests.second_order.tanh_network import T, X, assert_same_weights, fit, network, trainer_of

OPTIMIZERS = {"lbfgs": LBFGS, **{update: functools.partial(BFGS, update) for update in UPDATES}}
CLASSES = [LBFGS, BFGS]


@pytest.mark.parametrize("name", OPTIMIZERS)
class TestFit:
    def test_save_and_resume(self, name, tmp_path):
        trainer, other = (trainer_of(network(), OPTIMIZERS[name]()) for _ in range(2))
        fit(trainer, 6)
        fit(other, 3)
        other.save(tmp_path / "other.keras")
        other = keras.models.load_model(tmp_path / "other.keras")
        assert other.optimizer.get_config() == trainer.optimizer.get_config()
        fit(other, 3)
        assert_same_weights(other.model, trainer.model.get_weights())

    def test_logs(self, name):
        history = fit(trainer_of(network(), OPTIMIZERS[name]()), 3)
        assert history["step_reason"] == [0, 0, 0] and min(history["step_length"]) > 0
        assert np.isfinite(history["ratio"]).all()


@pytest.mark.float64
@pytest.mark.parametrize("optimizer", CLASSES)
def test_double_precision(optimizer):
    trainer = trainer_of(network(dtype="float64"), optimizer())
    history = fit(trainer, 40, X.astype("float64"), T.astype("float64"))
    assert np.all(np.diff(history["loss"]) < 0.0) and trainer.last_step.step.dtype == "float64"
    assert history["loss"][-1] < 0.1 * history["loss"][0]


@pytest.mark.parametrize("optimizer", CLASSES)
class TestNoStep:
    def test_no_step_that_lowers_the_loss(self, optimizer):
        # The loss is 50 w^2, and the only step that is tried leads from 0.005 to -0.495.
        model = keras.Sequential([keras.Input((1,)), layers.Dense(1, use_bias=False)])
        model.set_weights([np.array([[0.005]], "float32")])
        trainer = trainer_of(model, optimizer(max_evaluations=1), lambda y, z: 50.0 * z**2)
        fit(trainer, 1, np.ones((1, 1), "float32"), np.zeros((1, 1), "float32"))
        assert trainer.last_step.reason == StepReason.REJECTED
        assert "none of 1 step lengths" in trainer.last_step.message
        assert_same_weights(model, [np.array([[0.005]], "float32")])

    def test_infinity(self, optimizer):
        model = network()
        before = model.get_weights()
        trainer = trainer_of(model, optimizer(), lambda y, z: keras.ops.log(-1.0 - z**2))
        with pytest.warns(UserWarning, match="SecondOrder took no step"):
            fit(trainer, 1)
        assert trainer.last_step.reason == StepReason.NOT_FINITE
        assert_same_weights(model, before)


@pytest.mark.parametrize("optimizer", CLASSES)
class TestFrozenLayers:
    def test_frozen_after_building(self, optimizer):
        model = network()
        trainer = trainer_of(model, optimizer())
        fit(trainer, 2)
        before = model.get_weights()
        model.layers[0].trainable = False
        trainer.compile(trainer.optimizer, "mse")
        message = f"{optimizer.__name__} was built for 31 weights.*Received: 7 trainable weights.*a new optimizer"
        with pytest.raises(ValueError, match=message):
            fit(trainer, 1)
        assert_same_weights(model, before)
        trainer.compile(optimizer(), "mse")
        assert fit(trainer, 3)["step_reason"] == [StepReason.ACCEPTED] * 3
        assert_same_weights(model.layers[0], before[:2])

    def test_unfrozen_after_building(self, optimizer):
        model = network()
        model.layers[0].trainable = False
        trainer = trainer_of(model, optimizer())
        fit(trainer, 2)
        model.layers[0].trainable = True
        trainer.compile(trainer.optimizer, "mse")
        with pytest.raises(ValueError, match="built for 7 weights.*Received: 31 trainable weights"):
            fit(trainer, 1)

    def test_as_many_weights_of_another_layer(self, optimizer):
        model = keras.Sequential([keras.Input((3,)), layers.Dense(3, "tanh"), layers.Dense(3), layers.Dense(1)])
        model.layers[1].trainable = False
        trainer = trainer_of(model, optimizer())
        fit(trainer, 2)
        before = model.get_weights()
        model.layers[0].trainable, model.layers[1].trainable = False, True
        trainer.compile(trainer.optimizer, "mse")
        with pytest.raises(ValueError, match="built for 16 weights.*Received: 16 trainable weights, not the same ones"):
            fit(trainer, 1)
        assert_same_weights(model, before)

    def test_frozen_and_unfrozen_again(self, optimizer):
        model = network()
        trainer = trainer_of(model, optimizer())
        fit(trainer, 2)
        model.layers[0].trainable = False
        model.layers[0].trainable = True
        trainer.compile(trainer.optimizer, "mse")
        fit(trainer, 3)
        alone = trainer_of(network(), optimizer())
        fit(alone, 5)
        assert_same_weights(model, alone.model.get_weights())

    def test_frozen_before_saving(self, optimizer, tmp_path):
        trainer = trainer_of(network(), optimizer())
        fit(trainer, 3)
        trainer.model.layers[0].trainable = False
        trainer.save(tmp_path / "trainer.keras")
        message = f"{optimizer.__name__} starts without the curvature.*saved for other weights"
        with pytest.warns(UserWarning, match=message):
            loaded = keras.models.load_model(tmp_path / "trainer.keras")
        assert int(keras.ops.convert_to_numpy(loaded.optimizer.iterations)) == 3
        assert_same_weights(loaded.model, trainer.model.get_weights())
        # From then on as a new optimizer.
        fit(loaded, 4)
        anew = trainer_of(trainer.model, optimizer())
        fit(anew, 4)
        assert_same_weights(loaded.model, anew.model.get_weights())


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        *((cls, options) for cls in CLASSES for options in ({"max_evaluations": 0}, {"learning_rate": 2.0})),
        (LBFGS, {"memory": 0}),
        *((BFGS, options) for options in ({"update": "dfp"}, {"scales_first": 2}, {"max_weights": 0})),
    ],
)
def test_options(optimizer, options):
    with pytest.raises(ValueError, match=f"{optimizer.__name__} expects .*`{next(iter(options))}`"):
        optimizer(**options)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(LBFGS, {"memory": 3}), (BFGS, {"update": "ssbroyden", "scales_first": True, "max_weights": 50})],
)
def test_config(optimizer, options):
    options = {**options, "max_evaluations": 7, "learning_rate": 0.5, "name": "mine"}
    config = optimizer(**options).get_config()
    assert config.items() >= options.items()
    assert optimizer.from_config(config).get_config() == config
