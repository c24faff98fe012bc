"""Second-order steps on residuals that a function computes, with derivatives of the model inside."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools import backend as package_backend
from keras_gradtools.losses import SquaredResiduals
from keras_gradtools.models import SecondOrder
from keras_gradtools.optimizers import LBFGS, LevenbergMarquardt, Newton, NewtonCG
from keras_gradtools.second_order.newton_equation import ResidualSpace, WeightSpace
from keras_gradtools.second_order.normal_equations import NormalEquations

RNG = np.random.default_rng(5)
A, B, C = 1.5, -0.5, 0.25


class Curve(layers.Layer):
    """u(x) = a^2 x^2 + b^3 x^3 + c, so that u'' = 2 a^2 + 6 b^3 x."""

    def build(self, shape):
        self.w = self.add_weight(shape=(3,), initializer="zeros")

    def call(self, x):
        a, b, c = self.w[0], self.w[1], self.w[2]
        return a**2 * x**2 + b**3 * x**3 + c


def curve():
    model = keras.Sequential([keras.Input((1,)), Curve()])
    model.set_weights([np.array([A, B, C], "float32")])
    return model


def points(inside, ends):
    draw = np.random.default_rng(1)
    return {name: draw.normal(size=(n, 1)).astype("float32") for name, n in (("inside", inside), ("ends", ends))}


def by_laplacian(model, batch):
    equation = ops.reshape(kg.laplacian(model)(batch["inside"]), (-1, 1)) - 1.0
    return {"equation": equation, "ends": model(batch["ends"]) - 0.5}


def by_tapes(model, batch):
    x = batch["inside"]
    with kg.GradientTape() as outer:
        outer.watch(x)
        with kg.GradientTape() as inner:
            inner.watch(x)
            u = model(x)
        slope = inner.gradient(u, x)
    return {"equation": outer.gradient(slope, x) - 1.0, "ends": model(batch["ends"]) - 0.5}


def by_partial_derivatives(model, batch):
    (u_xx,) = kg.partial_derivatives(model, [(0, 0)])(batch["inside"])
    return {"equation": ops.reshape(u_xx, (-1, 1)) - 1.0, "ends": model(batch["ends"]) - 0.5}


WAYS = {"laplacian": by_laplacian, "tapes": by_tapes, "partial derivatives": by_partial_derivatives}
WEIGHTS = {"equation": 2.0, "ends": 7.0}


def scaled(batch, weights=WEIGHTS):
    """The vector r and its Jacobian, in closed form."""
    x, s = (batch[name][:, 0].astype("float64") for name in ("inside", "ends"))
    parts = [
        (weights["equation"], 2 * A**2 + 6 * B**3 * x - 1.0, [4 * A + 0 * x, 18 * B**2 * x, 0 * x]),
        (weights["ends"], A**2 * s**2 + B**3 * s**3 + C - 0.5, [2 * A * s**2, 3 * B**2 * s**3, 1 + 0 * s]),
    ]
    r = np.concatenate([np.sqrt(w / len(r)) * r for w, r, _ in parts])
    return r, np.concatenate([np.sqrt(w / len(r)) * np.stack(j, axis=1) for w, r, j in parts])


def trained(model, optimizer, loss, batch, epochs=1):
    trainer = SecondOrder(model)
    trainer.compile(optimizer, loss)
    history = trainer.fit(batch, epochs=epochs, verbose=0)
    return trainer, history.history


class TestOperators:
    @pytest.mark.parametrize("way", WAYS)
    def test_loss_gradient_and_matrix(self, way):
        batch = points(7, 3)
        r, j = scaled(batch)
        operator = kg.curvature.GaussNewton(curve(), SquaredResiduals(WAYS[way], WEIGHTS), batch)
        assert operator.loss() == pytest.approx(r @ r, rel=1e-5)
        np.testing.assert_allclose(operator.gradient(), 2 * j.T @ r, rtol=1e-4)
        np.testing.assert_allclose(operator.dense(), 2 * j.T @ j, rtol=1e-4, atol=1e-5)

    def test_hessian(self):
        batch = points(7, 3)
        r, j = scaled(batch)
        x, s = batch["inside"][:, 0], batch["ends"][:, 0]
        scale = [np.sqrt(2.0 / 7), np.sqrt(7.0 / 3)]
        second = np.zeros((3, 3))
        second[0, 0] = r @ np.concatenate([scale[0] * (4 + 0 * x), scale[1] * 2 * s**2])
        second[1, 1] = r @ np.concatenate([scale[0] * 36 * B * x, scale[1] * 6 * B * s**3])
        operator = kg.curvature.Hessian(curve(), SquaredResiduals(by_laplacian, WEIGHTS), batch)
        np.testing.assert_allclose(operator.dense(), 2 * (j.T @ j + second), rtol=1e-4, atol=1e-4)

    def test_is_that_of_the_mean_squared_error(self):
        model = keras.Sequential([keras.Input((3,)), layers.Dense(4, "tanh"), layers.Dense(2)])
        x, y = RNG.normal(size=(6, 3)).astype("float32"), RNG.normal(size=(6, 2)).astype("float32")
        loss = SquaredResiduals(lambda model, data: model(data[0]) - data[1])
        found, expected = kg.curvature.GaussNewton(model, loss, (x, y)), kg.curvature.GaussNewton(model, "mse", (x, y))
        assert found.loss() == pytest.approx(expected.loss(), rel=1e-5)
        np.testing.assert_allclose(found.dense(), expected.dense(), rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("form", ["dict", "list", "tuple", "dataset"])
    def test_forms_of_data(self, form):
        batch = points(7, 3)

        class Data(keras.utils.PyDataset):
            def __len__(self):
                return 1

            def __getitem__(self, place):
                return (batch,)

        data = {"dict": batch, "list": [batch], "tuple": (batch, None), "dataset": Data()}[form]
        r, _ = scaled(batch)
        operator = kg.curvature.GaussNewton(curve(), SquaredResiduals(by_laplacian, WEIGHTS), data)
        assert operator.loss() == pytest.approx(r @ r, rel=1e-5)
        assert operator.loss() == pytest.approx(r @ r, rel=1e-5)

    def test_regularizers_are_added(self):
        model = keras.Sequential([keras.Input((1,)), layers.Dense(1, kernel_regularizer=keras.regularizers.L2(0.3))])
        x = np.array([[1.0], [2.0]], "float32")
        operator = kg.curvature.GaussNewton(model, SquaredResiduals(lambda model, x: model(x)), x)
        w, b = (v.item() for v in model.get_weights())
        assert operator.loss() == pytest.approx(np.mean((w * x + b) ** 2) + 0.3 * w**2, rel=1e-5)
        np.testing.assert_allclose(operator.dense(), [[5.0 + 0.6, 3.0], [3.0, 2.0]], rtol=1e-5)

    def test_a_changed_constant_is_seen(self):
        model, constants = curve(), {"target": 0.5}

        def residuals(model, batch):
            return model(batch) - constants["target"]

        x = points(4, 1)["inside"]
        operator = kg.curvature.GaussNewton(model, SquaredResiduals(residuals), x)
        before = operator.loss()
        constants["target"] = 3.0
        u = A**2 * x**2 + B**3 * x**3 + C
        assert before == pytest.approx(np.mean((u - 0.5) ** 2), rel=1e-5)
        assert operator.loss() == pytest.approx(np.mean((u - 3.0) ** 2), rel=1e-5)


class TestLevenbergMarquardt:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("inside", [1, 9], ids=["fewer residuals than weights", "more"])
    def test_step_is_that_of_least_squares(self, way, inside):
        batch, damping = points(inside, 1), 20.0
        r, j = scaled(batch)
        expected = -np.linalg.solve(j.T @ j + 0.5 * damping * np.eye(3), j.T @ r)
        model = curve()
        trainer, logs = trained(model, LevenbergMarquardt(damping), SquaredResiduals(WAYS[way], WEIGHTS), batch)
        assert trainer.last_step.attempts == 1
        np.testing.assert_allclose(trainer.last_step.step, expected, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(model.get_weights()[0], np.array([A, B, C]) + expected, rtol=1e-4)
        assert logs["loss"][0] == pytest.approx(r @ r, rel=1e-5)
        assert logs["step_reason"] == [0.0] and logs["gradient_norm"][0] > 0

    @pytest.mark.parametrize("inside", [1, 9])
    def test_the_jacobian_is_formed_in_the_smaller_space(self, inside):
        batch = points(inside, 1)
        operator = kg.curvature.GaussNewton(curve(), SquaredResiduals(by_laplacian, WEIGHTS), batch)
        equations = NormalEquations(operator)
        loss, gradient, equation = equations.of(operator)
        r, j = scaled(batch)
        assert isinstance(equation, ResidualSpace if inside == 1 else WeightSpace)
        assert equations._is_possible and loss == pytest.approx(r @ r, rel=1e-5)
        np.testing.assert_allclose(gradient, 2 * j.T @ r, rtol=1e-4)

    def test_terms_of_other_shapes(self):
        """Several residuals of a point, one of all points, and one without an axis."""

        def residuals(model, x):
            u = model(x)
            return [ops.concatenate([u, 2.0 * u - 1.0], axis=1), ops.mean(u) - 1.0, ops.reshape(ops.sum(u * u), (1, 1))]

        model, x = curve(), points(5, 1)["inside"]
        operator = kg.curvature.GaussNewton(model, SquaredResiduals(residuals, [1.0, 2.0, 3.0]), x)
        equations = NormalEquations(operator)
        _, gradient, equation = equations.of(operator)
        assert equations._is_possible
        np.testing.assert_allclose(gradient, operator.gradient(), rtol=1e-4)
        step, _ = equation.solve(1.0)
        expected = np.linalg.solve(operator.dense().astype("float64") + np.eye(3), -operator.gradient())
        np.testing.assert_allclose(step, expected, rtol=5e-3)

    def test_residuals_that_mix_points(self):
        """The first axis is that of the points, but each residual depends on two of them."""

        def residuals(model, x):
            u = model(x)
            return u - ops.roll(u, 1, axis=0) + 0.5

        model, x = curve(), points(5, 1)["inside"]
        operator = kg.curvature.GaussNewton(model, SquaredResiduals(residuals), x)
        expected = np.linalg.solve(operator.dense().astype("float64") + np.eye(3), -operator.gradient())
        trainer, _ = trained(model, LevenbergMarquardt(1.0), SquaredResiduals(residuals), x)
        assert trainer.last_step.attempts == 1
        np.testing.assert_allclose(trainer.last_step.step, expected, rtol=1e-3)

    @pytest.mark.parametrize("options", [{}, {"scaling": "diagonal"}, {"geodesic_acceleration": True}])
    @pytest.mark.parametrize("units", [2, 30])
    def test_same_iterates_as_the_mean_squared_error(self, options, units):
        x = np.linspace(-1, 1, 24, dtype="float32")[:, None]
        y = np.sin(3 * x)

        def network():
            model = keras.Sequential([keras.Input((1,)), layers.Dense(units, "tanh"), layers.Dense(1)])
            draw = np.random.default_rng(0)
            model.set_weights([draw.normal(size=w.shape).astype("float32") for w in model.get_weights()])
            return model

        one, other = SecondOrder(network()), SecondOrder(network())
        one.compile(LevenbergMarquardt(**options), SquaredResiduals(lambda model, data: model(data[0]) - data[1]))
        other.compile(LevenbergMarquardt(**options), "mse")
        logs = one.fit(x, y, epochs=4, verbose=0).history
        expected = other.fit(x, y, batch_size=24, shuffle=False, epochs=4, verbose=0).history
        assert logs.keys() == expected.keys()
        for name in ("loss", "damping", "step_length", "step_reason"):
            np.testing.assert_allclose(logs[name], expected[name], rtol=2e-3, err_msg=name)
        for a, b in zip(one.get_weights(), other.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)

    def test_many_weights_are_solved_by_products(self, monkeypatch):
        monkeypatch.setattr("keras_gradtools.second_order.normal_equations._MOST_WEIGHTS", 2)
        monkeypatch.setattr("keras_gradtools.second_order.normal_equations._MOST_NUMBERS", 2)
        batch = points(9, 2)
        r, j = scaled(batch)
        trainer, logs = trained(curve(), LevenbergMarquardt(20.0), SquaredResiduals(by_laplacian, WEIGHTS), batch)
        assert logs["cg_iterations"][0] > 0
        rest = (2 * j.T @ j + 20.0 * np.eye(3)) @ trainer.last_step.step + 2 * j.T @ r
        assert np.linalg.norm(rest) <= 0.5 * np.linalg.norm(2 * j.T @ r)


class TestFit:
    @pytest.mark.parametrize("optimizer", [Newton, NewtonCG, LBFGS, LevenbergMarquardt])
    def test_every_optimizer_lowers_the_loss(self, optimizer):
        batch = points(20, 4)
        loss = SquaredResiduals(by_laplacian, WEIGHTS)
        trainer, logs = trained(curve(), optimizer(), loss, batch, epochs=6)
        assert all(b <= a * (1 + 1e-6) for a, b in zip(logs["loss"], logs["loss"][1:], strict=False))
        assert logs["loss"][-1] < 0.5 * logs["loss"][0]
        assert trainer.evaluate(batch, verbose=0) <= (1 + 1e-6) * logs["loss"][-1]

    def test_adam_first(self):
        batch, loss = points(20, 4), SquaredResiduals(by_tapes, WEIGHTS)
        model = curve()
        r, j = scaled(batch)
        first = kg.models.CompiledTraining(model)
        first.compile(keras.optimizers.SGD(1e-3), loss)
        assert first.fit(batch, verbose=0).history["loss"][0] == pytest.approx(r @ r, rel=1e-5)
        np.testing.assert_allclose(model.get_weights()[0], np.array([A, B, C]) - 2e-3 * j.T @ r, rtol=1e-4)
        first.compile(keras.optimizers.Adam(1e-2), loss)
        by_adam = first.fit(batch, epochs=5, verbose=0, validation_data=batch).history
        assert by_adam["val_loss"][-1] < by_adam["loss"][0] < r @ r
        _, logs = trained(model, LevenbergMarquardt(), loss, batch, epochs=3)
        assert logs["loss"][0] == pytest.approx(by_adam["val_loss"][-1], rel=1e-4)
        assert logs["loss"][-1] < logs["loss"][0]

    def test_labels_and_batches(self):
        x, y = RNG.normal(size=(12, 1)).astype("float32"), RNG.normal(size=(12, 1)).astype("float32")
        trainer = SecondOrder(curve())
        trainer.compile(LevenbergMarquardt(1e6), SquaredResiduals(lambda model, data: model(data[0]) - data[1]))
        trainer.fit(x, y, batch_size=4, shuffle=False, verbose=0)
        assert int(ops.convert_to_numpy(trainer.optimizer.iterations)) == 3
        expected = np.mean((A**2 * x**2 + B**3 * x**3 + C - y) ** 2)
        assert trainer.evaluate(x, y, verbose=0) == pytest.approx(expected, rel=1e-3)

    @pytest.mark.parametrize("form", ["tuple", "list", "tensors", "dataset", "array"])
    def test_forms_of_points(self, form):
        batch = points(9, 2)
        x, s = batch["inside"], batch["ends"]
        given: dict = {
            "tuple": (x, s),
            "list": [x, s],
            "tensors": tuple(map(ops.convert_to_tensor, (x, s))),
            "array": x,
        }

        class Data(keras.utils.PyDataset):
            def __len__(self):
                return 2

            def __getitem__(self, place):
                return ((x, s),)

        def residuals(model, sets):
            if form == "array":
                return {"equation": by_tapes(model, {"inside": sets, "ends": sets})["equation"]}
            return by_tapes(model, {"inside": sets[0], "ends": sets[1]})

        weights = {"equation": 2.0} if form == "array" else WEIGHTS
        trainer = SecondOrder(curve())
        trainer.compile(LevenbergMarquardt(1e9), SquaredResiduals(residuals, weights))
        logs = trainer.fit(Data() if form == "dataset" else given[form], verbose=0).history
        r, _ = scaled(batch)
        expected = r[:9] @ r[:9] if form == "array" else r @ r
        assert logs["loss"][0] == pytest.approx(expected, rel=1e-4)
        assert int(ops.convert_to_numpy(trainer.optimizer.iterations)) == (2 if form == "dataset" else 1)

    def test_predict_and_metrics_of_the_model_are_as_before(self):
        batch = points(9, 2)
        trainer, _ = trained(curve(), LevenbergMarquardt(), SquaredResiduals(by_laplacian, WEIGHTS), batch)
        np.testing.assert_allclose(
            trainer.predict(batch["inside"], verbose=0), ops.convert_to_numpy(trainer.model(batch["inside"])), rtol=1e-5
        )
        trainer.compile(LevenbergMarquardt(), "mse", metrics=["mae"])
        logs = trainer.fit(batch["inside"], batch["inside"], verbose=0).history
        assert "mae" in logs and trainer.loss == "mse"
        trainer.compile(LevenbergMarquardt(), SquaredResiduals(by_laplacian, WEIGHTS))
        assert "mae" not in trainer.fit(batch, verbose=0).history

    def test_train_on_batch(self):
        batch = points(9, 2)
        r, _ = scaled(batch)
        trainer = SecondOrder(curve())
        trainer.compile(LevenbergMarquardt(), SquaredResiduals(by_laplacian, WEIGHTS))
        assert trainer.test_on_batch(batch) == pytest.approx(r @ r, rel=1e-5)
        logs = trainer.train_on_batch(batch, return_dict=True)
        assert logs["loss"] == pytest.approx(r @ r, rel=1e-5) and logs["step_reason"] == 0

    def test_statistics_and_dropout(self):
        def network():
            keras.utils.set_random_seed(0)
            model = keras.Sequential(
                [keras.Input((1,)), layers.Dense(4), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(1)]
            )
            return model

        x = points(16, 1)["inside"]
        model = network()
        loss = SquaredResiduals(lambda model, x: model(x, training=True) - 1.0)
        trainer = SecondOrder(model)
        trainer.compile(LevenbergMarquardt(1e9), loss)
        losses = [trainer.fit(x, verbose=0).history["loss"][0] for _ in range(2)]
        assert losses[0] != losses[1]  # another mask, with weights that have hardly moved
        mean = ops.convert_to_numpy(model.layers[1].moving_mean)
        kernel = model.layers[0].get_weights()[0]
        expected = (1 - 0.99**2) * (x @ kernel).mean(axis=0)
        np.testing.assert_allclose(mean, expected, rtol=1e-3, atol=1e-5)

    def test_a_callback_takes_steps_on_residuals(self):
        batch, damping = points(9, 2), 20.0
        r, j = scaled(batch)
        step = kg.callbacks.NewtonStep(
            batch, solver="dense", curvature="gauss_newton", damping=damping, loss=SquaredResiduals(by_tapes, WEIGHTS)
        )
        model = curve()
        model.compile(keras.optimizers.SGD(0.0), "mse")
        model.fit(batch["inside"], batch["inside"], verbose=0, callbacks=[step])
        expected = -np.linalg.solve(j.T @ j + 0.5 * damping * np.eye(3), j.T @ r)
        np.testing.assert_allclose(step.last_step.step, expected, rtol=1e-3)

    def test_curvature_monitor_uses_the_compiled_residuals(self):
        batch = points(9, 2)
        trainer = SecondOrder(curve())
        trainer.compile(LevenbergMarquardt(1e9), SquaredResiduals(by_tapes, WEIGHTS))
        monitor = kg.callbacks.CurvatureMonitor(batch)
        logs = trainer.fit(batch, verbose=0, callbacks=[monitor]).history
        expected = np.linalg.eigvalsh(
            kg.curvature.Hessian(curve(), SquaredResiduals(by_tapes, WEIGHTS), batch).dense().astype("float64")
        )
        assert logs["hessian_max_eigenvalue"][0] == pytest.approx(expected.max(), rel=1e-2)


@keras.saving.register_keras_serializable(package="test_residuals")
def saved_residuals(model, batch):
    return by_tapes(model, batch)


class TestSaving:
    def test_a_saved_run_goes_on_bit_for_bit(self, tmp_path):
        model = keras.Sequential([keras.Input((1,)), layers.Dense(3, "tanh"), layers.Dense(1)])
        batch = points(9, 2)
        trainer, _ = trained(model, LevenbergMarquardt(), SquaredResiduals(saved_residuals, WEIGHTS), batch, epochs=2)
        trainer.save(tmp_path / "trainer.keras")
        loaded = keras.models.load_model(tmp_path / "trainer.keras")
        assert isinstance(loaded.loss, SquaredResiduals)
        assert loaded.loss.residuals is saved_residuals and loaded.loss.weights == WEIGHTS
        one = trainer.fit(batch, epochs=3, verbose=0).history
        assert loaded.fit(batch, epochs=3, verbose=0).history == one
        for a, b in zip(trainer.get_weights(), loaded.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
        compiled = kg.models.CompiledTraining(model)
        compiled.compile("sgd", SquaredResiduals(saved_residuals))
        compiled.save(tmp_path / "compiled.keras")
        assert keras.models.load_model(tmp_path / "compiled.keras").loss.residuals is saved_residuals


class TestErrors:
    @pytest.mark.parametrize(
        ("residuals", "message"),
        [
            (lambda model, x: None, "returns a real floating-point tensor, or a list or dict.*Received: None"),
            (lambda model, x: {"a": model(x), "b": None}, "Received: None .*for 'b'"),
            (lambda model, x: [], r"Received: \[\]"),
            (lambda model, x: ops.cast(model(x), "int32"), "Received: a tensor of dtype int32"),
            (lambda model, x: ops.cast(model(x), "complex64"), "Received: a tensor of dtype complex64"),
            (lambda model, x: np.zeros(3, "float32"), "Received: a ndarray of dtype float32"),
            (lambda model, x: model(x)[:0], "at least one residual"),
            (lambda model, x: x - 1.0, "do not. Call the model that the function gets"),
            (lambda model, x: {"a": model(x), "b": ops.ones((3,))}, "residuals 'b'.*, which do not"),
        ],
    )
    def test_what_the_function_returns(self, residuals, message):
        model = curve()
        before = model.get_weights()[0]
        trainer = SecondOrder(model)
        trainer.compile(LevenbergMarquardt(), SquaredResiduals(residuals))
        with pytest.raises(ValueError, match=message):
            trainer.fit(points(4, 1)["inside"], verbose=0)
        np.testing.assert_array_equal(model.get_weights()[0], before)

    def test_weights_of_other_terms(self):
        operator = kg.curvature.GaussNewton(curve(), SquaredResiduals(by_tapes, {"equation": 1.0}), points(4, 1))
        with pytest.raises(ValueError, match=r"weights for \['equation'\], and residuals for \['equation', 'ends'\]"):
            operator.loss()

    def test_numbers_that_are_not_finite(self):
        model = curve()
        trainer = SecondOrder(model)
        trainer.compile(LevenbergMarquardt(), SquaredResiduals(lambda model, x: ops.log(model(x) - 100.0)))
        with pytest.warns(UserWarning, match="took no step, since the loss is not finite"):
            logs = trainer.fit(points(4, 1)["inside"], verbose=0).history
        assert logs["step_reason"] == [3.0]
        np.testing.assert_array_equal(model.get_weights()[0], np.array([A, B, C], "float32"))
        trainer.compile(LevenbergMarquardt(), SquaredResiduals(by_tapes))
        batch = points(4, 2)
        batch["ends"][1] = np.nan
        with pytest.raises(ValueError, match="NaN or infinity in `x`"):
            trainer.fit(batch, verbose=0)

    def test_a_loss_that_a_layer_adds(self):
        model = keras.Sequential([keras.Input((1,)), layers.Dense(1, activity_regularizer="l2")])
        operator = kg.curvature.GaussNewton(model, SquaredResiduals(lambda model, x: model(x)), points(4, 1)["inside"])
        with pytest.raises(ValueError, match="adds 1 more in its `call`"):
            operator.loss()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"metrics": ["mae"]}, "no `metrics` with SquaredResiduals"),
            ({"weighted_metrics": ["mae"]}, "no `weighted_metrics` with"),
            ({"loss_weights": [1.0]}, "no `loss_weights` with"),
        ],
    )
    def test_compile(self, options, message):
        with pytest.raises(ValueError, match=message):
            SecondOrder(curve()).compile(LevenbergMarquardt(), SquaredResiduals(by_tapes), **options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"sample_weight": np.ones(4)}, "takes no `sample_weight`.*Multiply the residuals"),
            ({"class_weight": {0: 1.0}}, "takes no `class_weight`"),
            ({"validation_split": 0.5}, "takes no `validation_split`"),
        ],
    )
    def test_fit(self, options, message):
        trainer = SecondOrder(curve())
        trainer.compile(LevenbergMarquardt(), SquaredResiduals(by_tapes))
        with pytest.raises(ValueError, match=message):
            trainer.fit(points(4, 4), verbose=0, **options)

    @pytest.mark.parametrize("data", [None, (1, 2, 3, 4), {"x": np.float32(1.0)}, {}, [3]])
    def test_data(self, data):
        with pytest.raises(ValueError, match="GaussNewton (expects|needs)"):
            kg.curvature.GaussNewton(curve(), SquaredResiduals(by_tapes), data).loss()

    def test_several_replicas(self, monkeypatch):
        monkeypatch.setattr(package_backend, "is_shared_by_replicas", lambda batch, variable: True)
        trainer = SecondOrder(curve())
        trainer.compile(LevenbergMarquardt(), SquaredResiduals(by_tapes))
        with pytest.raises(ValueError, match="LevenbergMarquardt does not divide the points of SquaredResiduals among"):
            trainer.fit(points(4, 4), verbose=0)

    def test_processes_with_shares_of_other_sizes(self, monkeypatch):
        other = np.array([4.0, 3.0])
        operator = kg.curvature.Hessian(curve(), SquaredResiduals(by_tapes), points(4, 4))
        monkeypatch.setattr(
            package_backend,
            "summed_over_processes",
            lambda totals, count: ([totals[0] + other, totals[1] + other**2], 2),
        )
        with pytest.raises(ValueError, match=r"sets of \[4, 4\] points in this process, and of \[4.0, 3.5\] on"):
            operator.loss()

    def test_fisher(self):
        with pytest.raises(ValueError, match="Fisher needs a loss of labels and outputs"):
            kg.curvature.Fisher(curve(), SquaredResiduals(by_tapes), points(4, 1))

    def test_a_plain_model(self):
        model = curve()
        model.compile("sgd", SquaredResiduals(by_tapes))
        x = points(4, 1)["inside"]
        with pytest.raises(ValueError, match=r"Train with it by\s+`keras_gradtools.models.SecondOrder"):
            model.fit(x, x, verbose=0)

    @pytest.mark.parametrize("residuals", [None, "mse", 3.0, layers.Dense(1)])
    def test_residuals(self, residuals):
        with pytest.raises(ValueError, match=r"expects a function \(model, batch\) as `residuals`"):
            SquaredResiduals(residuals)

    @pytest.mark.parametrize("weights", ["a", -1.0, np.nan, np.inf, [1.0, None], {"a": True}])
    def test_weights(self, weights):
        with pytest.raises(ValueError, match="a number of 0 or more, a list or a dict of them, as `weights`"):
            SquaredResiduals(by_tapes, weights)
