"""Critical sharpness of quadratic losses, where it is a quotient of Rayleigh, and of losses without any."""

import math

import keras
import numpy as np
import pytest

import keras_gradtools as kg

RNG = np.random.default_rng(4)
X = RNG.normal(size=(8, 3)).astype("float32")
Y = RNG.normal(size=(8, 1)).astype("float32")
# The mean of (x'w - y)^2.
HESSIAN = 2.0 * X.T.astype("float64") @ X / len(X)


def linear():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, use_bias=False)])
    model.set_weights([np.array([[1.0], [-2.0], [0.5]], "float32")])
    return model


def gradient(model):
    w = model.get_weights()[0].astype("float64")
    return (2.0 * X.T @ (X @ w - Y) / len(X)).ravel()


class TestQuadratics:
    @pytest.mark.parametrize("start", [None, 1e-3, 50.0])
    def test_the_mean_curvature_along_the_gradient(self, start):
        model = linear()
        g = gradient(model)
        found = kg.curvature.critical_sharpness(kg.curvature.Hessian(model, "mse", (X, Y)), start=start, tol=1e-4)
        assert found.value == pytest.approx(g @ HESSIAN @ g / (g @ g), rel=2e-4)
        assert found.step == pytest.approx(2.0 / found.value)

    def test_another_direction(self):
        model = linear()
        g, d = gradient(model), np.linalg.solve(HESSIAN, gradient(model))
        found = kg.curvature.critical_sharpness(
            kg.curvature.Hessian(model, "mse", (X, Y)), d.astype("float32"), tol=1e-4
        )
        assert d @ HESSIAN @ d / (g @ d) == pytest.approx(1.0)
        assert found.value == pytest.approx(1.0, rel=2e-4)

    def test_less_than_ten_evaluations_near_the_last_step(self):
        hessian = kg.curvature.Hessian(linear(), "mse", (X, Y))
        exact = kg.curvature.critical_sharpness(hessian, tol=1e-4)
        for factor in (0.26, 0.7, 1.5, 3.9):
            found = kg.curvature.critical_sharpness(hessian, start=factor * exact.step)
            assert found.evaluations < 10 and found.value == pytest.approx(exact.value, rel=0.125)

    def test_the_weights_stay(self):
        model = linear()
        before = model.get_weights()[0]
        kg.curvature.critical_sharpness(kg.curvature.Hessian(model, "mse", (X, Y)))
        np.testing.assert_array_equal(model.get_weights()[0], before)


class TestNoCriticalStep:
    """Losses that only go down or up along the direction, or are flat."""

    def test_a_straight_descent(self):
        hessian = kg.curvature.Hessian(linear(), lambda y, z: z, (X, Y))
        found = kg.curvature.critical_sharpness(hessian)
        assert found.value == 0.0 and found.step == math.inf

    def test_an_ascent(self):
        hessian = kg.curvature.Hessian(linear(), lambda y, z: z, (X, Y))
        found = kg.curvature.critical_sharpness(hessian, -hessian.gradient())
        assert math.isnan(found.value) and math.isnan(found.step)

    def test_no_gradient(self):
        hessian = kg.curvature.Hessian(linear(), lambda y, z: 0.0 * z, (X, Y))
        assert math.isnan(kg.curvature.critical_sharpness(hessian).value)


def dropped():
    """A model with a mask, which all evaluations of an operator share."""
    layers = [keras.layers.Dense(6, "tanh"), keras.layers.Dropout(0.5, seed=3), keras.layers.Dense(1)]
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((3,)), *layers])


class TestSeveralEvaluationsInOneProgram:
    """They give the result of one program for each evaluation, which data in several batches take."""

    @pytest.mark.parametrize(("start", "tol"), [(None, 0.125), (1e-4, 0.5), (70.0, 1e-3)])
    def test_the_same_search(self, start, tol):
        model = dropped()
        operators = [kg.curvature.Hessian(model, "mse", (X, Y), training=True, batch_size=n, verbose=0) for n in (8, 5)]
        assert [h.can_evaluate_at_once() for h in operators] == [True, False]
        # Masks differ between one batch and two.
        operators[1] = kg.curvature.Hessian(model, "mse", (X, Y), training=True, verbose=0)
        operators[1].can_evaluate_at_once = lambda: False
        found, expected = (kg.curvature.critical_sharpness(h, start=start, tol=tol) for h in operators)
        assert found.evaluations == expected.evaluations
        np.testing.assert_allclose(found.step, expected.step, rtol=1e-4)
        np.testing.assert_allclose(found.value, 2.0 / found.step, rtol=1e-5)

    def test_batches_are_added(self):
        model = linear()
        g = gradient(model)
        hessian = kg.curvature.Hessian(model, "mse", (X, Y), batch_size=3, verbose=0)
        found = kg.curvature.critical_sharpness(hessian, tol=1e-4)
        assert found.value == pytest.approx(g @ HESSIAN @ g / (g @ g), rel=2e-4)

    @pytest.mark.parametrize("at_once", [True, False])
    def test_a_tolerance_below_rounding_ends(self, at_once, monkeypatch):
        hessian = kg.curvature.Hessian(linear(), "mse", (X, Y))
        monkeypatch.setattr(hessian, "can_evaluate_at_once", lambda: at_once)
        found = kg.curvature.critical_sharpness(hessian, tol=1e-300)
        g = gradient(linear())
        assert found.value == pytest.approx(g @ HESSIAN @ g / (g @ g), rel=1e-3)


class TestMonitor:
    def test_logs_it_during_fit(self):
        model = linear()
        g = gradient(model)
        model.compile(keras.optimizers.SGD(0.0), "mse")
        monitor = kg.callbacks.CurvatureMonitor((X, Y), quantities="critical_sharpness")
        history = model.fit(X, Y, epochs=2, verbose=0, callbacks=[monitor]).history
        np.testing.assert_allclose(history["critical_sharpness"], g @ HESSIAN @ g / (g @ g), rtol=0.125)
        np.testing.assert_allclose(history["gradient_norm"], np.linalg.norm(g), rtol=1e-5)
        assert "hessian_max_eigenvalue" not in history

    def test_with_the_eigenvalues(self):
        model = linear()
        model.compile(keras.optimizers.SGD(0.0), "mse")
        monitor = kg.callbacks.CurvatureMonitor((X, Y), quantities=("eigenvalues", "critical_sharpness"))
        history = model.fit(X, Y, verbose=0, callbacks=[monitor]).history
        assert history["hessian_max_eigenvalue"][0] == pytest.approx(np.linalg.eigvalsh(HESSIAN)[-1], rel=1e-4)
        assert history["critical_sharpness"][0] <= 1.125 * history["hessian_max_eigenvalue"][0]


class TestErrors:
    def test_a_matrix_has_no_loss(self):
        with pytest.raises(ValueError, match="critical_sharpness expects a curvature operator"):
            kg.curvature.critical_sharpness(np.eye(2))

    def test_a_direction_of_another_shape(self):
        with pytest.raises(ValueError, match=r"`direction` of shape \(3,\)"):
            kg.curvature.critical_sharpness(kg.curvature.Hessian(linear(), "mse", (X, Y)), np.ones(2))

    def test_unknown_quantities(self):
        with pytest.raises(ValueError, match="some of eigenvalues, critical_sharpness"):
            kg.callbacks.CurvatureMonitor((X, Y), quantities="sharpness")
