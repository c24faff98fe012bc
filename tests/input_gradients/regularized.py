"""`InputGradientRegularized` around small models, and a step of it against the reference."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_gradtools.models import InputGradientRegularized
from tests.input_gradients.tanh_network import (
    D,
    N,
    Reference,
    X,
    Y,
    all_outputs,
    cross_entropy,
    keras_margin,
    margin,
    network,
)

RNG = np.random.default_rng(3)
WEIGHT, RATE = 0.3, 0.02
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
SAMPLE_WEIGHT = RNG.uniform(0.2, 2.0, N).astype("float32")
EAGER = {"run_eagerly": True}
# What takes the least time for a step or two: on JAX, eager operations are compiled one by one.
QUICK = {} if keras.config.backend() == "jax" else EAGER
SLOW = pytest.mark.slow
TARGETS = {"loss": ("loss", cross_entropy()), "outputs": ("outputs", all_outputs()), "margin": (keras_margin, margin())}


# The penalty before each of three steps of gradient descent, as `tests/input_gradients/tanh_network.py` computes it:
# numbers that every backend is held to, and the reference as well.
PENALTIES = {
    ("exact", "loss", 1): (1.3789174, 1.3271628, 1.2775151),
    ("exact", "loss", 2): (0.48083526, 0.4734942, 0.46636618),
    ("exact", "loss", "inf"): (0.3157728, 0.31170357, 0.30774586),
    ("exact", "outputs", 1): (20.812437, 13.811115, 10.289453),
    ("exact", "outputs", 2): (2.5914631, 2.47426, 2.3649858),
    ("exact", "outputs", "inf"): (0.87708177, 0.85685476, 0.83729661),
    ("exact", "margin", 1): (6.2405942, 5.373636, 4.6695913),
    ("exact", "margin", 2): (2.146385, 2.0303783, 1.9233123),
    ("exact", "margin", "inf"): (1.4351179, 1.3674458, 1.3044442),
    ("finite_difference", "loss", 1): (1.4451509, 1.3885256, 1.33429),
    ("finite_difference", "loss", 2): (0.49787433, 0.49028126, 0.48292731),
    ("finite_difference", "loss", "inf"): (0.33101422, 0.32646714, 0.32205699),
    ("finite_difference", "outputs", 1): (19.69823, 13.337391, 10.017438),
    ("finite_difference", "outputs", 2): (2.4771333, 2.3665577, 2.2635586),
    ("finite_difference", "outputs", "inf"): (0.857572, 0.83791352, 0.81890701),
    ("finite_difference", "margin", 1): (6.3267713, 5.4617583, 4.7581641),
    ("finite_difference", "margin", 2): (2.1812602, 2.0628787, 1.9533858),
    ("finite_difference", "margin", "inf"): (1.4245645, 1.357519, 1.2950785),
}
# With all outputs and no draw, random projections are the exact Jacobian.
PENALTIES |= {
    ("random_projection", *key[1:]): PENALTIES[key] for key in list(PENALTIES) if key[:2] == ("exact", "outputs")
}


def regularized(model=None, weight=WEIGHT, rate=RATE, loss=LOSS, compiled=None, optimizer=None, **options):
    wrapped = InputGradientRegularized(network() if model is None else model, weight, **options)
    wrapped.compile(optimizer or keras.optimizers.SGD(rate), loss, **(compiled or {}))
    return wrapped


def fit(wrapped, epochs=1, x=X, y=Y, **kwargs):
    """A step for each epoch, or as many as `batch_size` says: what is logged for each."""
    return wrapped.fit(x, y, **{"batch_size": len(Y), "shuffle": False, "verbose": 0, **kwargs}, epochs=epochs).history


def evaluate(wrapped, x=X, y=Y, **kwargs):
    return wrapped.evaluate(x, y, **{"batch_size": len(Y), "verbose": 0, "return_dict": True, **kwargs})


def train(wrapped, x=X, y=Y, **kwargs):
    # Keras 3.10 logs the mean over all steps since the last reset.
    wrapped.reset_metrics()
    return wrapped.train_on_batch(x, y, return_dict=True, **kwargs)


def close(actual, desired, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(np.asarray(actual, "float64"), desired, rtol=rtol, atol=atol)


def assert_stepped(before, model, step, rate=RATE, rtol=2e-4, atol=2e-4):
    """Every weight of `model` moved from `before` as the reference says, to the precision of the difference."""
    for was, now, expected in zip(before, model.get_weights(), step.after, strict=True):
        close((was.astype("float64") - now) / rate, (was - expected) / rate, rtol, atol)


def reference_of(method, target, norm=2, **options):
    return Reference(TARGETS[target][1], method, norm, **options)


# For a loss of x . w the gradient is w everywhere, its squared norm |w|^2, and a step of gradient descent known.
LINEAR = np.array([[1.0], [-2.0], [0.5], [1.5]], "float32")


@keras.saving.register_keras_serializable(package="tests_input_gradient_methods")
def first_output(y, y_pred):
    return y_pred[:, 0]


def linear(**kwargs):
    model = keras.Sequential([keras.Input((D,)), layers.Dense(1, use_bias=False, **kwargs)])
    model.set_weights([LINEAR])
    return model


@keras.saving.register_keras_serializable(package="tests_input_gradient_methods")
class Ramp(keras.optimizers.schedules.LearningRateSchedule):
    """Steps of 0.1, from 0.1 on."""

    def __call__(self, step):
        return 0.1 * (ops.cast(step, "float32") + 1.0)

    def get_config(self):
        return {}


def descent(weights, every=1, x=X, rate=RATE):
    """The loss and the penalty before each step, and w after all; `weights` of the penalty at each."""
    w, losses, penalties = LINEAR.astype("float64"), [], []
    for number, weight in enumerate(weights):
        batch = x[number] if x.ndim == 3 else x
        factor = 0.0 if number % every else weight * every
        penalties.append((w**2).sum())
        losses.append(np.mean(batch @ w) + factor * penalties[-1])
        w = w - rate * (batch.mean(axis=0)[:, None] + 2 * factor * w)
    return np.array(losses), np.array(penalties), w
