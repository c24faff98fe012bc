"""An operator is one matrix, whatever is drawn between its products; and it moves on no generator of the user's."""

import random

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.curvature import Fisher, GaussNewton, Hessian
from tests.compilers import compiled_by

RNG = np.random.default_rng(2)
N, D = 8, 4
X = RNG.normal(size=(N, D)).astype("float32")
T = RNG.normal(size=(N, 1)).astype("float32")
V = RNG.normal(size=D).astype("float32")
ELSEWHERE = keras.random.SeedGenerator(5)


class Own(layers.Layer):
    """Draws from a seed of its own."""

    def __init__(self):
        super().__init__()
        self.seed = keras.random.SeedGenerator(3)

    def call(self, x, training=False):
        return x * keras.random.uniform(ops.shape(x), seed=self.seed) if training else x


class Elsewhere(layers.Layer):
    """Draws from a seed that no layer has."""

    def call(self, x, training=False):
        return x * keras.random.uniform(ops.shape(x), seed=ELSEWHERE) if training else x


class Global(layers.Layer):
    """Draws from Keras' global seed."""

    def call(self, x, training=False):
        return x * keras.random.uniform(ops.shape(x)) if training else x


SEEDINGS = {
    "Dropout with a seed": lambda: layers.Dropout(0.5, seed=7),
    "Dropout without one": lambda: layers.Dropout(0.5),
    "keras.random with a seed of the layer": Own,
    "keras.random with a seed elsewhere": Elsewhere,
    "keras.random without a seed": Global,
}


def drawing(seeding, *more):
    model = keras.Sequential([keras.Input((D,)), SEEDINGS[seeding](), *more, layers.Dense(1, use_bias=False)])
    model.layers[-1].kernel.assign(np.ones((D, 1)))
    return model


def dropped(model):
    """What the last layer is given in the next call."""
    return ops.convert_to_numpy(model.layers[0](X, training=True)).astype("float64")


def seeds_of(model):
    return [ops.convert_to_numpy(v).tolist() for v in [*model.variables, ELSEWHERE.state]]


# On JAX, Keras draws without a seed in eager mode only, which is slow and says so.
@pytest.mark.filterwarnings("ignore:.*runs .* eagerly")
@pytest.mark.parametrize("seeding", SEEDINGS)
def test_calls_in_between(seeding):
    keras.utils.set_random_seed(1)
    model = drawing(seeding)
    found = Hessian(model, "mse", (X, T), training=True, verbose=0)
    product, loss, gradient = found @ V, found.loss(), found.gradient()
    # It has drawn nothing for itself: the next call has the mask that it is of.
    x = dropped(model)
    assert np.abs(x - X).max() > 0.1
    np.testing.assert_allclose(product, 2 * x.T @ (x @ V) / N, rtol=1e-5, atol=1e-5)
    for _ in range(2):
        model(X, training=True)
        assert np.array_equal(found @ V, product)
        assert found.loss() == loss and np.array_equal(found.gradient(), gradient)
    np.testing.assert_allclose(found.dense() @ V, product, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.linearized() @ V, product, rtol=1e-5, atol=1e-6)
    # Others, at the states of now.
    again = Hessian(model, "mse", (X, T), training=True, verbose=0)
    found.draw_anew()
    products = found @ V, again @ V
    x = dropped(model)
    assert np.abs(2 * x.T @ (x @ V) / N - product).max() > 1e-2
    for other in products:
        np.testing.assert_allclose(other, 2 * x.T @ (x @ V) / N, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["GaussNewton", "exact", "monte_carlo", "empirical"])
@pytest.mark.parametrize("seeding", ["Dropout with a seed", "Dropout without one"])
def test_the_other_matrices(kind, seeding):
    model = drawing(seeding)
    options = {} if kind == "GaussNewton" else {"kind": kind}
    cls = Fisher if options else GaussNewton
    found = cls(model, "mse", (X, T), training=True, batch_size=5, verbose=0, **options)
    product = found @ V
    for _ in range(2):
        model(X, training=True)
        assert np.array_equal(found @ V, product)


@pytest.mark.filterwarnings("ignore:.*runs .* eagerly")
def test_the_users_generators_are_left_alone():
    def draws():
        return (
            random.random(),
            ops.convert_to_numpy(keras.random.uniform((2,))).tolist(),
            ops.convert_to_numpy(layers.Dropout(0.5)(X, training=True)).tolist(),
        )

    keras.utils.set_random_seed(4)
    expected = draws()
    models = [drawing(seeding) for seeding in SEEDINGS]
    before = [seeds_of(model) for model in models]
    keras.utils.set_random_seed(4)
    for model in models:
        found = Hessian(model, "mse", (X, T), training=True, verbose=0)
        found @ V
        found.draw_anew()
        found.gradient()
    assert draws() == expected
    assert [seeds_of(model) for model in models] == before


def test_masks_share_a_program():
    calls = []

    def counted(y_true, y_pred):
        calls.append(None)
        return ops.mean((y_true - y_pred) ** 2, axis=-1)

    model = drawing("Dropout with a seed")
    found = Hessian(model, counted, (X, T), training=True, verbose=0)
    compiled_by(lambda: found @ V)
    traced = len(calls)
    model(X, training=True)
    found.draw_anew()
    found @ V
    assert len(calls) == traced


def test_a_loss_that_draws_from_a_seed():
    def loss(y_true, y_pred):
        factor = keras.random.uniform(ops.shape(y_pred), seed=seed)
        return ops.mean(factor * (y_true - y_pred) ** 2, axis=-1)

    seed = ELSEWHERE
    model = drawing("keras.random with a seed elsewhere")
    found = Hessian(model, loss, (X, T), training=True, verbose=0)
    product = found @ V
    model(X, training=True)
    assert np.array_equal(found @ V, product)


class TestSteps:
    """Those who take steps draw anew at each of them."""

    def test_newton_step(self):
        model = drawing("Dropout with a seed")
        model.compile(keras.optimizers.SGD(0.0), "mse")
        step = kg.callbacks.NewtonStep((X, T), training=True, solver="dense", damping=1e3, allow_underdetermined=True)
        gradients, losses = [], []

        class Seen(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                gradients.append(step.last_step.gradient_norm)
                losses.append(step.last_step.loss)

        model.fit(X, T, epochs=3, batch_size=N, verbose=0, shuffle=False, callbacks=[step, Seen()])
        # The damping is so large that nothing but the mask changes them.
        assert len({round(g, 3) for g in gradients}) == 3 and len({round(loss, 3) for loss in losses}) == 3

    @pytest.mark.parametrize("seeding", ["Dropout with a seed", "Dropout without one"])
    def test_second_order(self, seeding):
        model = drawing(seeding)
        trainer = kg.models.SecondOrder(model)
        trainer.compile(kg.optimizers.Newton(damping=1e4, allow_underdetermined=True), "mse")
        history = trainer.fit(X, T, epochs=3, batch_size=N, verbose=0, shuffle=False).history
        assert len({round(loss, 3) for loss in history["loss"]}) == 3
