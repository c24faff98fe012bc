"""`NewtonStep` in Keras' own loop."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.callbacks import NewtonStep
from keras_gradtools.curvature import Hessian
from keras_gradtools.models import InputGradientRegularized
from keras_gradtools.optimizers import StepReason

RNG = np.random.default_rng(7)
N, D, K = 24, 3, 2
X = RNG.normal(size=(N, D)).astype("float32")
T = RNG.normal(size=(N, 1)).astype("float32")
CLASSES = (X[:, 0] + 0.5 * RNG.normal(size=N) > 0).astype("int32")
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
COLUMNS = np.concatenate([X, np.ones((N, 1))], axis=1).astype("float64")


def compiled(outputs=1, loss="mse", rate=0.0, hidden=None):
    hidden = [layers.Dense(hidden, "tanh")] if hidden else []
    model = keras.Sequential([keras.Input((D,)), *hidden, layers.Dense(outputs)])
    draw = np.random.default_rng(1)
    model.set_weights([draw.normal(size=w.shape) for w in model.get_weights()])
    # A rate of zero: what changes the weights is the callback.
    model.compile(keras.optimizers.SGD(rate), loss)
    return model


def fit(model, step, y=T, epochs=1, **kwargs):
    return model.fit(X, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=[step], **kwargs).history


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("solver", ["cg", "dense"])
def test_one_step_solves_linear_least_squares(solver, curvature):
    model = compiled()
    # In batches, the last of them ragged.
    step = NewtonStep((X, T), solver=solver, curvature=curvature, damping=0.0, rtol=1e-6, batch_size=10)
    history = fit(model, step)
    kernel, bias = model.get_weights()
    expected = np.linalg.lstsq(COLUMNS, T, rcond=None)[0]
    np.testing.assert_allclose(np.append(kernel[:, 0], bias), expected[:, 0], atol=1e-4)
    assert history["newton_step_reason"] == [StepReason.ACCEPTED]
    assert history["newton_ratio"][0] == pytest.approx(1.0, abs=1e-3)


def test_the_last_layer_alone():
    model = compiled(K, CROSS_ENTROPY, hidden=4)
    before = model.get_weights()
    head = model.layers[-1]
    step = NewtonStep((X, CLASSES), variables=head, solver="dense", damping=1e-2)
    expected = Hessian(model, CROSS_ENTROPY, (X, CLASSES), head, verbose=0)
    matrix = expected.dense().astype("float64") + 1e-2 * np.eye(len(expected.dense()))
    p = -np.linalg.solve(matrix, expected.gradient().astype("float64"))
    history = fit(model, step, CLASSES)
    after = model.get_weights()
    for a, b in zip(before[:2], after[:2], strict=True):
        np.testing.assert_array_equal(a, b)
    moved = np.concatenate([(b - a).ravel() for a, b in zip(before[2:], after[2:], strict=True)])
    assert step.last_step.attempts == 1
    np.testing.assert_allclose(moved, p, rtol=1e-2, atol=1e-4)
    assert history["newton_step_length"][0] == pytest.approx(np.linalg.norm(p), rel=1e-2)


def test_losses_go_down_epoch_by_epoch():
    model = compiled(K, CROSS_ENTROPY, hidden=4)
    step = NewtonStep((X, CLASSES))
    history = fit(model, step, CLASSES, epochs=4)
    losses = [model.evaluate(X, CLASSES, verbose=0), *history["loss"][::-1]]
    assert losses == sorted(losses)
    assert step.damping == history["newton_damping"][-1]


def test_every_few_batches_in_between_steps_of_adam():
    class Count(keras.callbacks.Callback):
        seen = ()

        def on_train_batch_end(self, batch, logs=None):
            if "newton_step_reason" in logs:
                self.seen = (*self.seen, batch)

    model = compiled(rate=0.01)
    count, step = Count(), NewtonStep((X, T), every=2, solver="dense", damping=0.0)
    history = model.fit(X, T, batch_size=4, epochs=1, verbose=0, callbacks=[step, count]).history
    assert count.seen == (1, 3, 5)
    # The last step is the last thing that happened to the weights.
    kernel, bias = model.get_weights()
    expected = np.linalg.lstsq(COLUMNS, T, rcond=None)[0]
    np.testing.assert_allclose(np.append(kernel[:, 0], bias), expected[:, 0], atol=1e-4)
    assert history["newton_step_reason"][0] == step.last_step.reason


def test_products_of_earlier_steps_save_products():
    draw = np.random.default_rng(0)
    # Features of very different size: many iterations of conjugate gradients.
    x = (draw.normal(size=(200, 30)) * np.geomspace(0.1, 3, 30)).astype("float32")
    classes = (x.sum(1) > 0).astype("int32")
    dense = layers.Dense(K, kernel_regularizer=keras.regularizers.L2(1e-3))
    model = keras.Sequential([keras.Input((30,)), dense])
    model.compile(keras.optimizers.SGD(0.0), CROSS_ENTROPY)
    before, taken = model.get_weights(), {}
    for rank in (0, None):
        model.set_weights(before)
        step = NewtonStep((x, classes), rtol=1e-4, preconditioner_rank=rank)
        history = model.fit(x, classes, epochs=8, verbose=0, callbacks=[step]).history
        taken[rank] = sum(history["newton_cg_iterations"][1:])
    assert taken[None] < 0.75 * taken[0]


def test_with_a_wrapper():
    model = compiled()
    wrapper = InputGradientRegularized(model, 0.1)
    wrapper.compile(keras.optimizers.SGD(0.0), "mse")
    fit(wrapper, NewtonStep((X, T), solver="dense", damping=0.0))
    expected = np.linalg.lstsq(COLUMNS, T, rcond=None)[0]
    np.testing.assert_allclose(model.get_weights()[0], expected[:D], atol=1e-4)


def test_a_line_for_each_step(capsys):
    fit(compiled(), NewtonStep((X, T), verbose=1))
    assert "NewtonStep: the loss went down, from " in capsys.readouterr().out


def test_a_line_for_a_rejected_step(capsys):
    @kg.custom_gradient
    def reversed_square(x):
        return ops.square(x), lambda upstream: -2.0 * x * upstream

    model = compiled()
    step = NewtonStep((X, T), loss=lambda y, p: ops.mean(reversed_square(p - 9.0), -1), max_attempts=3, verbose=1)
    fit(model, step)
    out = capsys.readouterr().out
    assert f"NewtonStep: no step, since the loss went up with 3 dampings; loss {step.last_step.loss:.6g}, damp" in out


def test_infinity_leaves_the_weights():
    model = compiled()
    model.set_weights([np.full((D, 1), 1e30), np.zeros(1)])
    with pytest.warns(UserWarning, match="NewtonStep took no step, since the loss is not finite"):
        history = fit(model, NewtonStep((X, T)))
    assert history["newton_step_reason"] == [StepReason.NOT_FINITE]


class TestErrors:
    def unchanged(self, step, match, model=None):
        model = model or compiled(hidden=6)
        before = model.get_weights()
        with pytest.raises(ValueError, match=match):
            fit(model, step)
        for a, b in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_data_that_are_not_finite(self):
        x = X.copy()
        x[5] = np.inf
        self.unchanged(NewtonStep((x, T)), "NewtonStep expects finite data. Received: NaN or infinity in `x`")

    def test_too_few_examples(self):
        self.unchanged(NewtonStep((X, T), solver="dense"), "Received: 24 examples with 24 outputs in all")

    def test_a_frozen_layer(self):
        model = compiled(hidden=6)
        model.layers[0].trainable = False
        self.unchanged(NewtonStep((X, T), variables=model.layers[0]), "trainable variable", model)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"solver": "lu"}, "as `solver`"),
            ({"curvature": "fisher"}, "as `curvature`"),
            ({"damping": -1}, "as `damping`"),
            ({"every": 0}, "as `every`"),
            ({"every": "batch"}, "as `every`"),
            ({"max_iterations": 0}, "as `max_iterations`"),
            ({"max_attempts": 1.5}, "as `max_attempts`"),
            ({"rtol": 0.0}, "as `rtol`"),
            ({"preconditioner_rank": -1}, "as `preconditioner_rank`"),
        ],
    )
    def test_options(self, options, match):
        with pytest.raises(ValueError, match=match):
            NewtonStep((X, T), **options)
