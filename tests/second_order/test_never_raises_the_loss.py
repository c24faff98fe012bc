"""No step of any optimizer raises the loss of random classifiers and regressions, until the gradient vanishes."""

import functools
import os

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_gradtools.models import SecondOrder
from keras_gradtools.optimizers import BFGS, LBFGS, LevenbergMarquardt, Newton, NewtonCG
from keras_gradtools.second_order.broyden_family import UPDATES

COUNT, START = int(os.environ.get("MODELS", "50")), int(os.environ.get("FIRST_MODEL", "0"))
EXAMPLES, INPUTS = 40, 3
# Hidden units, activation, and classes or outputs.
KINDS = [((), None, 2), ((4,), "tanh", 3), ((8,), "softplus", 4), ((5, 4), "tanh", 2), ((6,), "gelu", 3)]
OPTIMIZERS = {
    "newton": Newton,
    "newton_cg": NewtonCG,
    "levenberg_marquardt": LevenbergMarquardt,
    "lbfgs": LBFGS,
    **{update: functools.partial(BFGS, update) for update in UPDATES},
}
TASKS = ["classifier", "regression"]
# Until the gradient is below this. Then the last digits of a loss in single precision hide most steps.
VANISHED, MOST_STEPS = 2e-3, 1000
# What rounding can add to a loss, relative to it.
ROUNDING = 16 * 2.0**-23


class UntilTheGradientVanishes(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = logs["gradient_norm"] < VANISHED


class Fits:
    """Fits of random models of one kind, compiled once. Each starts with a new state of the optimizer."""

    def __init__(self, name, task, kind):
        units, activation, self.outputs = KINDS[kind]
        self.task = task
        # The penalty makes minima isolated: a classifier could lower its loss for ever.
        l2 = keras.regularizers.L2(1e-2)
        hidden = [layers.Dense(n, activation, kernel_regularizer=l2) for n in units]
        outputs = layers.Dense(self.outputs, kernel_regularizer=l2)
        self.model = keras.Sequential([keras.Input((INPUTS,)), *hidden, outputs])
        self.trainer = SecondOrder(self.model)
        is_classifier = task == "classifier"
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True) if is_classifier else "mse"
        self.trainer.compile(OPTIMIZERS[name](), loss)
        self.trainer.optimizer.build(self.trainer.trainable_variables)
        self.initial = [ops.convert_to_numpy(v) for v in self.trainer.optimizer.variables]

    def history(self, seed, epochs):
        draw = np.random.default_rng(seed)
        for variable, value in zip(self.trainer.optimizer.variables, self.initial, strict=True):
            variable.assign(value)
        self.model.set_weights([draw.normal(size=w.shape).astype("float32") for w in self.model.get_weights()])
        x = draw.normal(size=(EXAMPLES, INPUTS)).astype("float32")
        if self.task == "classifier":
            y = draw.integers(0, self.outputs, EXAMPLES).astype("int32")
        else:
            y = draw.normal(size=(EXAMPLES, self.outputs)).astype("float32")
        callbacks = [UntilTheGradientVanishes()]
        options = {"batch_size": EXAMPLES, "shuffle": False, "verbose": 0, "callbacks": callbacks}
        return self.trainer.fit(x, y, epochs=epochs, **options).history


def rises(losses):
    """The number of steps that raised the loss by more than rounding."""
    return int(np.sum(np.diff(losses) > ROUNDING * losses[:-1]))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["newton", "newton_cg", "levenberg_marquardt", "lbfgs", "ssbroyden"])
def test_one_model(name, task):
    losses = np.array(Fits(name, task, 1).history(0, 6)["loss"])
    assert rises(losses) == 0 and losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_many_models(name, task):
    """`MODELS=1000` tries so many."""
    wrong = {}
    for kind in range(len(KINDS)):
        fits = Fits(name, task, kind)
        for seed in range(START + kind, START + COUNT, len(KINDS)):
            history = fits.history(seed, MOST_STEPS)
            losses, gradients = np.array(history["loss"]), np.array(history["gradient_norm"])
            if rises(losses) or gradients[-1] >= VANISHED:
                wrong[seed] = f"{rises(losses)} of {len(losses)} steps raise the loss, gradient {gradients[-1]:.1e}"
    assert not wrong
