"""`SecondOrder` in Keras' own loop."""

import functools
import inspect
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools import memory
from keras_gradtools.curvature import GaussNewton, Hessian
from keras_gradtools.models import SecondOrder
from keras_gradtools.optimizers import LevenbergMarquardt, Newton, NewtonCG, StepReason

RNG = np.random.default_rng(5)
N, D = 24, 3
X = RNG.normal(size=(N, D)).astype("float32")
T = RNG.normal(size=(N, 1)).astype("float32")
CLASSES = (X[:, 0] + X[:, 1] > 0).astype("int32")
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def randomized(model, seed=1):
    draw = np.random.default_rng(seed)
    model.set_weights(
        [draw.normal(size=w.shape).astype(w.dtype) if w.dtype.kind == "f" else w for w in model.get_weights()]
    )
    return model


def linear():
    return randomized(keras.Sequential([keras.Input((D,)), layers.Dense(1)]))


def small(outputs=1, units=2):
    return randomized(keras.Sequential([keras.Input((D,)), layers.Dense(units, "tanh"), layers.Dense(outputs)]))


def trainer_of(model, optimizer, loss="mse", **kwargs):
    trainer = SecondOrder(model)
    trainer.compile(optimizer, loss, **kwargs)
    return trainer


def fit(trainer, epochs=1, batch_size=N, x=X, y=T, **kwargs):
    return trainer.fit(x, y, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0, **kwargs).history


def pairs_of(optimizer):
    """What the preconditioner of `NewtonCG` keeps."""
    return {v.name: ops.convert_to_numpy(v.value) for v in optimizer.variables if "eigen" in v.name}


def least_squares():
    """Kernel and bias of the best linear model, in double precision."""
    columns = np.concatenate([X, np.ones((N, 1))], axis=1).astype("float64")
    return np.linalg.lstsq(columns, T.astype("float64"), rcond=None)[0]


OPTIMIZERS = {
    "newton": lambda **kwargs: Newton(**kwargs),
    "lm": lambda **kwargs: LevenbergMarquardt(**kwargs),
    "lm, diagonal": lambda **kwargs: LevenbergMarquardt(scaling="diagonal", **kwargs),
    "cg": lambda **kwargs: NewtonCG(rtol=1e-6, **kwargs),
    "cg, gauss-newton": lambda **kwargs: NewtonCG(rtol=1e-6, curvature="gauss_newton", **kwargs),
}


class TestLinearLeastSquares:
    """Of which one step without damping is the solution."""

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_one_step_solves_it(self, name):
        model = linear()
        trainer = trainer_of(model, OPTIMIZERS[name](damping=0.0))
        history = fit(trainer)
        kernel, bias = model.get_weights()
        np.testing.assert_allclose(np.append(kernel[:, 0], bias), least_squares()[:, 0], rtol=1e-4, atol=1e-5)
        assert history["ratio"][0] == pytest.approx(1.0, abs=1e-4)
        assert history["step_reason"] == [StepReason.ACCEPTED]

    def test_with_sample_weights(self):
        weights = RNG.uniform(0.1, 2.0, N).astype("float32")
        model = linear()
        fit(trainer_of(model, LevenbergMarquardt(damping=0.0)), sample_weight=weights)
        columns = np.concatenate([X, np.ones((N, 1))], axis=1) * np.sqrt(weights)[:, None]
        expected = np.linalg.lstsq(columns, T * np.sqrt(weights)[:, None], rcond=None)[0]
        kernel, bias = model.get_weights()
        np.testing.assert_allclose(np.append(kernel[:, 0], bias), expected[:, 0], rtol=1e-4, atol=1e-5)

    def test_a_learning_rate_shortens_it(self):
        model = linear()
        before = np.append(model.get_weights()[0][:, 0], model.get_weights()[1])
        history = fit(trainer_of(model, Newton(damping=0.0, learning_rate=0.25)))
        kernel, bias = model.get_weights()
        expected = 0.75 * before + 0.25 * least_squares()[:, 0]
        np.testing.assert_allclose(np.append(kernel[:, 0], bias), expected, rtol=1e-4, atol=1e-5)
        assert history["ratio"][0] == pytest.approx(1.0, abs=1e-3)


class TestOneStep:
    """Against the equation that it solves, in NumPy."""

    @pytest.mark.parametrize("name", ["newton", "lm", "cg"])
    def test_solves_the_damped_equation(self, name):
        model, damping = small(), 0.5
        cls = GaussNewton if name == "lm" else Hessian
        operator = cls(model, "mse", (X, T), batch_size=N, verbose=0)
        # The Hessian is made positive definite, or conjugate gradients would rightly stop.
        lowest = np.linalg.eigvalsh(operator.dense().astype("float64"))[0]
        damping = max(damping, 0.1 - lowest)
        matrix = operator.dense().astype("float64") + damping * np.eye(operator.shape[0])
        expected = -np.linalg.solve(matrix, operator.gradient().astype("float64"))
        before = np.concatenate([w.ravel() for w in model.get_weights()])
        trainer = trainer_of(model, OPTIMIZERS[name](damping=damping))
        history = fit(trainer)
        after = np.concatenate([w.ravel() for w in model.get_weights()])
        assert trainer.last_step.attempts == 1
        np.testing.assert_allclose(after - before, expected, rtol=2e-3, atol=2e-5)
        assert history["step_length"][0] == pytest.approx(np.linalg.norm(expected), rel=1e-3)
        assert history["gradient_norm"][0] == pytest.approx(np.linalg.norm(operator_gradient(before)), rel=1e-4)

    def test_marquardts_damping(self):
        model = small()
        operator = GaussNewton(model, "mse", (X, T), batch_size=N, verbose=0)
        matrix = operator.dense().astype("float64")
        expected = -np.linalg.solve(matrix + 0.5 * np.diag(np.diag(matrix)), operator.gradient().astype("float64"))
        before = np.concatenate([w.ravel() for w in model.get_weights()])
        fit(trainer_of(model, LevenbergMarquardt(0.5, "diagonal")))
        after = np.concatenate([w.ravel() for w in model.get_weights()])
        np.testing.assert_allclose(after - before, expected, rtol=2e-3, atol=2e-5)


def operator_gradient(weights):
    model = small()
    parts, start = [], 0
    for w in model.get_weights():
        parts.append(weights[start : start + w.size].reshape(w.shape))
        start += w.size
    model.set_weights(parts)
    return Hessian(model, "mse", (X, T), batch_size=N, verbose=0).gradient()


class TestNeverWorse:
    def test_levenberg_marquardt_converges(self):
        model = small(units=4)
        history = fit(trainer_of(model, LevenbergMarquardt()), epochs=40)
        losses = history["loss"]
        assert all(b <= a * (1 + 1e-6) for a, b in zip(losses, losses[1:], strict=False))
        assert history["gradient_norm"][-1] < 1e-3 * history["gradient_norm"][0]

    def test_a_step_that_cannot_go_down_leaves_the_weights(self):
        # The gradient points the wrong way: no damping makes the loss fall.
        @kg.custom_gradient
        def reversed_square(x):
            return ops.square(x), lambda upstream: -2.0 * x * upstream

        model = linear()
        trainer = trainer_of(
            model, NewtonCG(curvature="hessian", max_attempts=3), lambda y, p: ops.mean(reversed_square(p - 9.0), -1)
        )
        before = model.get_weights()
        history = fit(trainer)
        assert history["step_reason"][0] == StepReason.REJECTED
        assert trainer.last_step.step is None and trainer.last_step.attempts == 3
        for a, b in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_at_a_minimum(self):
        model = linear()
        solution = least_squares()
        model.set_weights([solution[:D].astype("float32"), solution[D].astype("float32")])
        trainer = trainer_of(model, LevenbergMarquardt())
        history = fit(trainer, epochs=6)
        assert history["step_reason"][-1] in (StepReason.VANISHED, StepReason.ACCEPTED)
        np.testing.assert_allclose(model.get_weights()[0], solution[:D], rtol=1e-4)

    def test_infinity_ends_the_step(self):
        model = linear()
        model.set_weights([np.full((D, 1), 1e30, "float32"), np.zeros(1, "float32")])
        before = model.get_weights()
        trainer = trainer_of(model, LevenbergMarquardt())
        with pytest.warns(UserWarning, match="SecondOrder took no step, since the loss is not finite"):
            history = fit(trainer, epochs=2)
        assert history["step_reason"] == [StepReason.NOT_FINITE] * 2
        for a, b in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


class TestAsAModel:
    @pytest.mark.parametrize("steps", [2, 3])
    def test_every_batch_of_an_execution_is_a_step(self, steps):
        # On torch before Keras 3.16 as well: the training loop of Keras does without, and this one is our own.
        one, several = (
            trainer_of(linear(), LevenbergMarquardt(damping=1.0), steps_per_execution=count) for count in (1, steps)
        )
        # Four batches: of three at a time, the last execution has one.
        expected, found = (fit(trainer, epochs=2, batch_size=6)["loss"] for trainer in (one, several))
        assert int(ops.convert_to_numpy(several.optimizer.iterations)) == 8
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        for mine, its in zip(several.get_weights(), one.get_weights(), strict=True):
            np.testing.assert_allclose(mine, its, rtol=1e-5)

    def test_save_and_resume(self, tmp_path):
        alone = fit(trainer_of(small(), LevenbergMarquardt()), epochs=6)
        trainer = trainer_of(small(), LevenbergMarquardt())
        first = fit(trainer, epochs=3)
        trainer.save(tmp_path / "trainer.keras")
        loaded = keras.models.load_model(tmp_path / "trainer.keras")
        assert loaded.optimizer.damping == trainer.optimizer.damping == pytest.approx(first["damping"][-1])
        rest = fit(loaded, epochs=3)
        for name in ("loss", "damping", "step_length"):
            np.testing.assert_allclose(first[name] + rest[name], alone[name], rtol=1e-5, err_msg=name)
        assert int(ops.convert_to_numpy(loaded.optimizer.iterations)) == 6

    def test_a_preconditioner_is_resumed(self, tmp_path):
        def trainer_of_many():
            model = small(outputs=2, units=6)
            return trainer_of(model, NewtonCG(rtol=1e-4, preconditioner_rank=15), CROSS_ENTROPY)

        alone = fit(trainer_of_many(), epochs=8, y=CLASSES)
        trainer = trainer_of_many()
        first = fit(trainer, epochs=4, y=CLASSES)
        trainer.save(tmp_path / "trainer.keras")
        loaded = keras.models.load_model(tmp_path / "trainer.keras")
        found = {v.name: ops.convert_to_numpy(v) for v in loaded.optimizer.variables}
        assert (
            found["eigenvectors"].shape == (15, 38)
            and found["eigenvalues"].any()
            and found["preconditioner_state"].any()
        )
        rest = fit(loaded, epochs=4, y=CLASSES)
        assert first["cg_iterations"] + rest["cg_iterations"] == alone["cg_iterations"]
        for name in ("loss", "damping", "step_length"):
            np.testing.assert_allclose(first[name] + rest[name], alone[name], rtol=1e-4, err_msg=name)

    def test_the_wait_of_a_preconditioner_goes_on(self):
        trainer = trainer_of(small(outputs=2, units=6), NewtonCG(rtol=1e-4, preconditioner_rank=5), CROSS_ENTROPY)
        assert min(fit(trainer, epochs=4, y=CLASSES)["cg_iterations"][2:]) >= 5
        (state,) = [v for v in trainer.optimizer.variables if v.name == "preconditioner_state"]
        before = pairs_of(trainer.optimizer)
        # Seven systems to let pass, of which three have.
        state.assign([0.5, 7, 3])
        assert fit(trainer, epochs=2, y=CLASSES)["step_reason"] == [StepReason.ACCEPTED] * 2
        np.testing.assert_allclose(ops.convert_to_numpy(state.value), [0.5, 7, 5])
        for name, value in pairs_of(trainer.optimizer).items():
            np.testing.assert_array_equal(value, before[name])

    def test_a_layer_frozen_after_loading(self, tmp_path):
        trainer = trainer_of(small(outputs=2, units=6), NewtonCG(rtol=1e-4), CROSS_ENTROPY)
        fit(trainer, epochs=4, y=CLASSES)
        trainer.save(tmp_path / "trainer.keras")
        loaded = keras.models.load_model(tmp_path / "trainer.keras")
        before = pairs_of(loaded.optimizer)
        assert before["eigenvalues"].any()
        loaded.model.layers[0].trainable = False
        history = fit(loaded, epochs=2, y=CLASSES)
        assert history["step_reason"] == [StepReason.ACCEPTED] * 2
        for a, b in zip(trainer.model.layers[0].get_weights(), loaded.model.layers[0].get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
        for name, value in pairs_of(loaded.optimizer).items():
            np.testing.assert_array_equal(value, before[name])

    @pytest.mark.parametrize(
        ("first", "then", "compiles"),
        [
            ([True, False], [False, True], True),
            ([True, True], [False, True], False),
            ([False, True], [True, True], True),
        ],
        ids=["swapped", "frozen", "unfrozen"],
    )
    def test_a_preconditioner_begins_anew_with_other_weights(self, first, then, compiles):
        """As many products as with a new optimizer, and the same weights, to rounding."""
        draw = np.random.default_rng(0)
        x = (draw.normal(size=(200, 30)) * np.geomspace(0.1, 3, 30)).astype("float32")
        classes = (x.sum(1) > 0).astype("int32")
        units = [layers.Dense(2, kernel_regularizer=keras.regularizers.L2(1e-3)) for _ in range(2)]
        inputs = keras.Input((30,))
        model = randomized(keras.Model(inputs, units[0](inputs) + units[1](ops.flip(inputs, axis=1))))

        def choose(which):
            for layer, flag in zip(units, which, strict=True):
                layer.trainable = flag

        choose(first)
        trainer = trainer_of(model, NewtonCG(rtol=1e-4), CROSS_ENTROPY)
        fit(trainer, 4, 200, x, classes)
        assert pairs_of(trainer.optimizer)["eigenvalues"].any()
        choose(then)
        if compiles:
            trainer.compile(trainer.optimizer, CROSS_ENTROPY)
        before, damping = model.get_weights(), trainer.optimizer.damping
        history = fit(trainer, 4, 200, x, classes)
        found = model.get_weights()
        assert max(history["cg_iterations"]) >= 10, "the preconditioner had nothing to learn from"

        model.set_weights(before)
        alone = trainer_of(model, NewtonCG(rtol=1e-4), CROSS_ENTROPY)
        alone.optimizer.damping = damping
        expected = fit(alone, 4, 200, x, classes)
        # Without a preconditioner it would be 30 more, and with one for other weights as many.
        assert abs(sum(history["cg_iterations"]) - sum(expected["cg_iterations"])) <= 6
        np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-4)
        for a, b in zip(found, model.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3)

    @pytest.mark.parametrize("optimizer", [Newton, LevenbergMarquardt, NewtonCG])
    def test_a_layer_that_is_frozen_between_two_fits_stands_still(self, optimizer):
        """Also without `compile`."""
        trainer = trainer_of(small(), optimizer())
        fit(trainer, 2)
        hidden, last = trainer.model.layers
        hidden.trainable = False
        frozen, trained = hidden.get_weights(), last.get_weights()
        assert fit(trainer, 2)["step_reason"][0] == StepReason.ACCEPTED
        for a, b in zip(frozen, hidden.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
        assert any(np.any(a != b) for a, b in zip(trained, last.get_weights(), strict=True))
        hidden.trainable = True
        fit(trainer, 2)
        assert any(np.any(a != b) for a, b in zip(frozen, hidden.get_weights(), strict=True))

    def test_a_layer_frozen_before_saving(self, tmp_path):
        trainer = trainer_of(small(outputs=2, units=6), NewtonCG(rtol=1e-4), CROSS_ENTROPY)
        fit(trainer, epochs=3, y=CLASSES)
        trainer.model.layers[0].trainable = False
        trainer.save(tmp_path / "trainer.keras")
        loaded = keras.models.load_model(tmp_path / "trainer.keras")
        assert loaded.optimizer.damping == trainer.optimizer.damping != 1e-3
        assert int(ops.convert_to_numpy(loaded.optimizer.iterations)) == 3
        assert fit(loaded, epochs=2, y=CLASSES)["step_reason"] == [StepReason.ACCEPTED] * 2

    @pytest.mark.parametrize(
        ("saved", "loaded"),
        [(5, 4), (5, 5), *[pytest.param(*ranks, marks=pytest.mark.fast_on("torch")) for ranks in ((0, 5), (5, 0))]],
    )
    def test_a_preconditioner_of_another_rank_is_left_out(self, saved, loaded, tmp_path):
        trainer = trainer_of(small(outputs=2, units=6), NewtonCG(rtol=1e-4, preconditioner_rank=saved), CROSS_ENTROPY)
        fit(trainer, epochs=3, y=CLASSES)
        store = {}
        trainer.optimizer.save_own_variables(store)
        other = trainer_of(small(outputs=2, units=6), NewtonCG(preconditioner_rank=loaded), CROSS_ENTROPY)
        fit(other, epochs=1, y=CLASSES)
        with warnings.catch_warnings(action="error"):
            other.optimizer.load_own_variables(store)
        assert other.optimizer.damping == trainer.optimizer.damping
        assert int(ops.convert_to_numpy(other.optimizer.iterations)) == 3
        if loaded:
            for name, value in pairs_of(other.optimizer).items():
                expected = pairs_of(trainer.optimizer)[name] if loaded == saved else np.zeros_like(value)
                np.testing.assert_array_equal(value, expected)

    def test_bfloat16(self):
        policy = keras.config.dtype_policy()
        keras.config.set_dtype_policy("bfloat16")
        try:
            model = small(outputs=2, units=6)
        finally:
            keras.config.set_dtype_policy(policy)
        trainer = trainer_of(model, NewtonCG(rtol=1e-2, curvature="gauss_newton", damping=0.1), CROSS_ENTROPY)
        history = fit(trainer, epochs=4, y=CLASSES)
        assert history["loss"][-1] < history["loss"][0]

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_the_optimizer_keeps_its_settings(self, name):
        optimizer = OPTIMIZERS[name](damping=0.5, max_attempts=4, learning_rate=0.5)
        again = type(optimizer).from_config(optimizer.get_config())
        assert again.get_config() == optimizer.get_config()
        assert again.damping == 0.5 and again.max_attempts == 4

    def test_metrics_validation_and_callbacks(self, tmp_path):
        trainer = trainer_of(small(outputs=2), NewtonCG(), CROSS_ENTROPY, metrics=["accuracy"])
        log = tmp_path / "log.csv"
        history = fit(
            trainer,
            epochs=3,
            batch_size=12,
            y=CLASSES,
            validation_data=(X, CLASSES),
            callbacks=[keras.callbacks.CSVLogger(log)],
        )
        assert {"accuracy", "val_accuracy", "val_loss", "damping", "step_reason"} <= set(history)
        assert history["val_accuracy"][-1] == pytest.approx(trainer.evaluate(X, CLASSES, verbose=0)[1])
        assert history["val_loss"][-1] < history["val_loss"][0]
        assert "damping" in log.read_text().splitlines()[0]
        assert trainer.predict(X, verbose=0).shape == (N, 2)

    @pytest.mark.parametrize("name", ["fit", "train_on_batch"])
    def test_products_of_earlier_steps_save_products(self, name):
        draw = np.random.default_rng(0)
        # Features of very different size: many iterations of conjugate gradients.
        x = (draw.normal(size=(200, 30)) * np.geomspace(0.1, 3, 30)).astype("float32")
        classes = (x.sum(1) > 0).astype("int32")
        model = randomized(
            keras.Sequential([keras.Input((30,)), layers.Dense(2, kernel_regularizer=keras.regularizers.L2(1e-3))])
        )
        before, taken = model.get_weights(), {}
        for rank in (0, None):
            model.set_weights(before)
            trainer = trainer_of(model, NewtonCG(rtol=1e-4, preconditioner_rank=rank), CROSS_ENTROPY)
            if name == "fit":
                history = fit(trainer, 8, 200, x, classes)
            else:
                logs = [trainer.train_on_batch(x, classes, return_dict=True) for _ in range(8)]
                history = {key: [log[key] for log in logs] for key in logs[0]}
            assert np.all(np.diff(history["loss"]) <= 0)
            taken[rank] = sum(history["cg_iterations"][1:])
        assert taken[None] < 0.75 * taken[0]

    @pytest.mark.parametrize("metrics", [None, ["mae"]])
    @pytest.mark.parametrize("return_dict", [False, True])
    def test_train_on_batch_returns_what_keras_returns(self, metrics, return_dict, monkeypatch):
        def logs():
            trainer = trainer_of(linear(), LevenbergMarquardt(), metrics=metrics)
            return [trainer.train_on_batch(X, T, return_dict=return_dict) for _ in range(3)]

        direct = logs()
        monkeypatch.setattr("keras_gradtools.backend.can_step_directly", lambda model: False)
        by_keras = logs()
        assert direct == by_keras
        if return_dict:
            assert list(direct[-1]) == list(by_keras[-1])

    def test_train_on_batch_in_a_callback_of_fit(self):
        class Extra(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                if epoch == 0:
                    self.model.train_on_batch(X, T)

        trainer, other = (trainer_of(small(), LevenbergMarquardt()) for _ in range(2))
        fit(trainer, 3, callbacks=[Extra()])
        fit(other, 4)
        for a, b in zip(trainer.model.get_weights(), other.model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_train_on_batch_and_class_weights(self):
        trainer = trainer_of(small(outputs=2), NewtonCG(), CROSS_ENTROPY)
        first = trainer.train_on_batch(X, CLASSES, class_weight={0: 1.0, 1: 3.0}, return_dict=True)
        assert (
            trainer.train_on_batch(X, CLASSES, class_weight={0: 1.0, 1: 3.0}, return_dict=True)["loss"] < first["loss"]
        )

    def test_regularizers_are_part_of_the_loss(self):
        model = randomized(
            keras.Sequential([keras.Input((D,)), layers.Dense(1, kernel_regularizer=keras.regularizers.L2(0.3))])
        )
        fit(trainer_of(model, LevenbergMarquardt(damping=0.0)))
        centered, targets = X - X.mean(0), T - T.mean()
        expected = np.linalg.solve(centered.T @ centered / N + 0.3 * np.eye(D), centered.T @ targets / N)
        np.testing.assert_allclose(model.get_weights()[0], expected, rtol=1e-3, atol=1e-5)

    def test_dropout_has_one_mask_for_a_step(self):
        model = randomized(
            keras.Sequential([keras.Input((D,)), layers.Dense(8, "tanh"), layers.Dropout(0.5, seed=3), layers.Dense(1)])
        )
        trainer = trainer_of(model, NewtonCG(curvature="gauss_newton"))
        history = fit(trainer, epochs=4)
        assert history["step_reason"] == [StepReason.ACCEPTED] * 4
        seeds = [v for v in model.non_trainable_variables if "seed" in v.path]
        assert all(np.ptp(ops.convert_to_numpy(v)) > 0 for v in seeds)

    def test_batch_normalization_is_updated_once_a_step(self):
        model = randomized(
            keras.Sequential([keras.Input((D,)), layers.BatchNormalization(momentum=0.75), layers.Dense(1)])
        )
        bn = model.layers[0]
        bn.moving_mean.assign(np.zeros(D))
        fit(trainer_of(model, NewtonCG()))
        np.testing.assert_allclose(ops.convert_to_numpy(bn.moving_mean), 0.25 * X.mean(0), rtol=1e-4, atol=1e-6)
        frozen = SecondOrder(model, training=False)
        frozen.compile(NewtonCG(), "mse")
        fit(frozen)
        np.testing.assert_allclose(ops.convert_to_numpy(bn.moving_mean), 0.25 * X.mean(0), rtol=1e-4, atol=1e-6)

    def test_weights_are_those_of_the_wrapped_model(self):
        model = small()
        trainer = trainer_of(model, LevenbergMarquardt())
        fit(trainer, epochs=2)
        np.testing.assert_allclose(trainer.predict(X, verbose=0), model.predict(X, verbose=0), rtol=1e-6)
        assert trainer.model is model

    def test_a_model_whose_python_depends_on_values_runs_eagerly(self, backend):
        if backend == "jax":
            pytest.skip("Keras traces the model on JAX to build the metrics, also with `run_eagerly=True`")

        class Branch(layers.Layer):
            def call(self, x):
                return x if ops.sum(ops.square(x)) > 0 else -x

            def compute_output_spec(self, x):
                return keras.KerasTensor(x.shape, x.dtype)

        plain = linear()
        model = keras.Sequential([keras.Input((D,)), layers.Dense(1), Branch()])
        model.set_weights(plain.get_weights())
        before = np.mean(np.abs(plain.predict(X, verbose=0) - T))
        trainer = trainer_of(model, LevenbergMarquardt(damping=0.0), metrics=["mae"], run_eagerly=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*eagerly, which is slower")
            history = fit(trainer)
        np.testing.assert_allclose(history["mae"], [before], rtol=1e-5)
        found = np.concatenate([w.ravel() for w in model.get_weights()])
        np.testing.assert_allclose(found, least_squares()[:, 0], rtol=1e-3)


class TestErrors:
    def unchanged(self, model, run, error, match):
        before = model.get_weights()
        with pytest.raises(error, match=match):
            run()
        for a, b in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

    @pytest.mark.parametrize("optimizer", ["adam", None, keras.optimizers.SGD()], ids=["name", "none", "sgd"])
    def test_a_first_order_optimizer(self, optimizer):
        with pytest.raises(ValueError, match="SecondOrder expects a second-order optimizer"):
            SecondOrder(linear()).compile(optimizer, "mse")

    def test_a_second_order_optimizer_elsewhere(self):
        model = linear()
        model.compile(Newton(), "mse")
        self.unchanged(model, lambda: model.fit(X, T, verbose=0), ValueError, "models.SecondOrder.model.")

    @pytest.mark.parametrize("place", ["x", "y"])
    def test_data_that_are_not_finite(self, place):
        model = small()
        x, y = X.copy(), T.copy()
        (x if place == "x" else y)[3] = np.nan
        trainer = trainer_of(model, LevenbergMarquardt())
        match = f"NaN or infinity in `{place}`, in batch 0, in 1 examples, the first at index 3"
        self.unchanged(model, lambda: fit(trainer, x=x, y=y), ValueError, match)

    def test_a_batch_that_is_too_small(self):
        model = small(units=6)
        trainer = trainer_of(model, Newton())
        match = r"forms the matrix of 31 weights, .*Received: 24 examples with 24 outputs in all. Take at least 31"
        self.unchanged(model, lambda: fit(trainer), ValueError, match)
        trainer = trainer_of(model, Newton(allow_underdetermined=True))
        assert fit(trainer, epochs=2)["loss"][1] < fit(trainer)["loss"][0] + 1e9

    @pytest.mark.parametrize("optimizer", [Newton, NewtonCG, LevenbergMarquardt])
    def test_messages_name_the_optimizer(self, optimizer):
        model = small()

        def one_number(y, y_pred):
            return ops.mean((y - y_pred) ** 2)

        match = f"{optimizer.__name__} needs a loss with one value for each example"
        trainer = trainer_of(model, optimizer(), one_number)
        self.unchanged(model, lambda: fit(trainer), ValueError, match)

    def test_a_matrix_without_room(self, monkeypatch):
        monkeypatch.setattr(memory, "machine_bytes", lambda: 100)
        model = small()
        match = r"The matrix of this Newton would have the shape .* Use keras_gradtools.optimizers.NewtonCG"
        self.unchanged(model, lambda: fit(trainer_of(model, Newton())), MemoryError, match)

    def test_help_says_what_compile_takes(self):
        text = inspect.getdoc(SecondOrder.compile)
        assert "One of `kg.optimizers`" in text and "SquaredResiduals" in text and "rmsprop" not in text
        assert list(inspect.signature(SecondOrder.compile).parameters) == list(
            inspect.signature(keras.Model.compile).parameters
        )

    def test_no_labels(self):
        trainer = trainer_of(linear(), Newton(), loss=None)
        with pytest.raises(ValueError, match="SecondOrder trains on labels"):
            trainer.fit(X, verbose=0)

    def test_a_model_that_does_not_repeat(self):
        class Noise(layers.Layer):
            def call(self, x):
                return x + float(np.random.default_rng().normal()) * ops.mean(x) + noise()

        def noise():
            return np.random.default_rng().normal(size=(1, D)).astype("float32")

        model = keras.Sequential([keras.Input((D,)), Noise(name="noise"), layers.Dense(1)])
        trainer = trainer_of(model, NewtonCG())
        if not repeats_when_compiled():
            self.unchanged(model, lambda: fit(trainer), ValueError, "noise")

    @pytest.mark.parametrize(
        ("make", "match"),
        [
            (lambda: Newton(damping=-1.0), "number of 0 or more as `damping`"),
            (lambda: Newton(damping=float("nan")), "as `damping`"),
            (lambda: Newton(max_attempts=0), "positive integer as `max_attempts`"),
            (lambda: Newton(learning_rate=2.0), "at most 1, or a schedule, as `learning_rate`"),
            (lambda: LevenbergMarquardt(scaling="units"), "as `scaling`"),
            (lambda: NewtonCG(curvature="fisher"), "as `curvature`"),
            (lambda: NewtonCG(max_iterations=True), "as `max_iterations`"),
            (lambda: NewtonCG(rtol=2.0), "as `rtol`"),
            (lambda: NewtonCG(preconditioner_rank=1.5), "as `preconditioner_rank`"),
            (lambda: SecondOrder(linear(), training="yes"), "as `training`"),
            (lambda: SecondOrder(keras.Sequential([layers.Dense(1)])), "built model"),
        ],
    )
    def test_options(self, make, match):
        with pytest.raises(ValueError, match=match):
            make()

    def test_half_precision(self):
        model = keras.Sequential([keras.Input((D,)), layers.Dense(1, dtype="mixed_float16")], name="half")
        policy = keras.dtype_policies.DTypePolicy("mixed_float16")
        with pytest.raises(ValueError, match="in float16"):
            SecondOrder(model, dtype=policy)


@functools.cache
def repeats_when_compiled():
    """Whether NumPy's numbers become constants of a program, so that there is nothing to refuse."""
    draw = kg.jit(lambda x: x + float(np.random.default_rng().normal()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(draw(1.0)) == float(draw(1.0))
