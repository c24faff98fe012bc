"""Levenberg-Marquardt steps in the space of the outputs, bent by geodesic acceleration, and by products."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.models import SecondOrder
from keras_gradtools.optimizers import LevenbergMarquardt
from keras_gradtools.second_order import normal_equations
from keras_gradtools.second_order.geodesic_acceleration import GeodesicAcceleration
from keras_gradtools.second_order.newton_equation import ResidualSpace, WeightSpace

RNG = np.random.default_rng(3)
X = RNG.normal(size=(6, 3)).astype("float32")
T = RNG.normal(size=(6, 2)).astype("float32")
CLASSES = np.array([0, 1, 2, 1, 0, 2])
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
WEIGHTS = np.array([1.0, 0.5, 2.0, 1.0, 0.25, 3.0], "float32")


def network(outputs=2):
    """With more weights than the six examples have outputs."""
    model = keras.Sequential([keras.Input((3,)), layers.Dense(8, "tanh"), layers.Dense(outputs)])
    draw = np.random.default_rng(1)
    model.set_weights([draw.normal(size=w.shape).astype("float32") for w in model.get_weights()])
    return model


def first_step(model, optimizer, loss, y, sample_weight=None, x=X):
    trainer = SecondOrder(model)
    trainer.compile(optimizer, loss)
    trainer.fit(x, y, sample_weight=sample_weight, batch_size=len(x), shuffle=False, verbose=0)
    return trainer.last_step


class TestEquations:
    """The same equation in both spaces: B = A'A and g = A'b."""

    @pytest.mark.parametrize("scaling", ["identity", "diagonal"])
    @pytest.mark.parametrize("damping", [1e-3, 10.0])
    def test_both_have_one_solution(self, scaling, damping):
        factors = RNG.normal(size=(3, 2, 2))
        jacobians, u = RNG.normal(size=(3, 2, 9)), RNG.normal(size=(3, 2))
        root, b = (np.swapaxes(factors, 1, 2) @ jacobians).reshape(6, 9), RNG.normal(size=6)
        residual_space = ResidualSpace(root, b, factors, scaling)
        weight_space = WeightSpace(root.T @ root, root.T @ b, scaling)
        (expected, _), (found, used) = weight_space.solve(damping), residual_space.solve(damping)
        np.testing.assert_allclose(found, expected, rtol=1e-8)
        d = np.diag(root.T @ root) if scaling == "diagonal" else np.ones(9)
        np.testing.assert_allclose((root.T @ root + damping * np.diag(d)) @ found, -root.T @ b, rtol=1e-8)
        assert used == damping and residual_space.size == pytest.approx(weight_space.size)
        assert residual_space.curved(found) == pytest.approx(weight_space.curved(expected))
        assert residual_space.length(found) == pytest.approx(np.linalg.norm(np.sqrt(d) * found))
        # Another right side, J' L L' u, given as u and as the vector.
        hessians = factors @ np.swapaxes(factors, 1, 2)
        pulled = np.einsum("ekn,ek->n", jacobians, np.einsum("eij,ej->ei", hessians, u))
        expected, _ = weight_space.solve(damping, weight_space.right_side(u, pulled))
        found, _ = residual_space.solve(damping, residual_space.right_side(u, pulled))
        np.testing.assert_allclose(found, expected, rtol=1e-8)

    def test_without_damping_the_step_is_the_shortest(self):
        root, b = RNG.normal(size=(3, 5)), RNG.normal(size=3)
        found, _ = ResidualSpace(root, b, np.zeros((3, 1, 1))).solve(0.0)
        np.testing.assert_allclose(found, -np.linalg.pinv(root) @ b, rtol=1e-8)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_numbers_that_are_not_finite(self, bad):
        assert not ResidualSpace(np.array([[1.0, bad]]), np.zeros(1), np.zeros((1, 1, 1))).is_finite
        assert not WeightSpace(np.array([[bad]]), np.zeros(1)).is_finite


class TestFewerOutputsThanWeights:
    @pytest.mark.parametrize(
        ("loss", "y", "outputs", "scaling"),
        [
            pytest.param("mse", T, 2, "diagonal", id="mse-diagonal"),
            pytest.param(CROSS_ENTROPY, CLASSES, 3, "identity", id="cross-entropy-identity"),
            pytest.param("mse", T, 2, "identity", id="mse-identity", marks=pytest.mark.fast_on("torch")),
            pytest.param(
                *(CROSS_ENTROPY, CLASSES, 3, "diagonal"),
                id="cross-entropy-diagonal",
                marks=pytest.mark.fast_on("torch"),
            ),
        ],
    )
    def test_solves_the_damped_equation(self, scaling, loss, y, outputs):
        # The Hessian of the cross-entropy is singular: the same number may be added to all logits.
        model = network(outputs)
        operator = kg.curvature.GaussNewton(model, loss, (X, y, WEIGHTS))
        matrix, gradient = operator.dense().astype("float64"), operator.gradient()
        d = np.maximum(np.diag(matrix), 1e-6 * matrix.max()) if scaling == "diagonal" else np.ones(len(matrix))
        damping = 10.0 if scaling == "diagonal" else 0.1
        expected = np.linalg.solve(matrix + damping * np.diag(d), -gradient)
        before = np.concatenate([w.ravel() for w in model.get_weights()])
        found = first_step(model, LevenbergMarquardt(damping=damping, scaling=scaling), loss, y, WEIGHTS)
        assert found.attempts == 1
        np.testing.assert_allclose(found.step, expected, rtol=2e-3, atol=1e-4)
        after = np.concatenate([w.ravel() for w in model.get_weights()])
        np.testing.assert_allclose(after - before, found.step, atol=1e-6)

    def test_interpolates_the_data(self):
        trainer = SecondOrder(network())
        trainer.compile(LevenbergMarquardt(), "mse")
        assert trainer.fit(X, T, batch_size=6, epochs=30, verbose=0).history["loss"][-1] < 1e-10

    def test_a_slope_without_curvature(self):
        # The mean absolute error is straight: the matrix is 0, and damping alone makes the step.
        model = network()
        gradient = kg.curvature.GaussNewton(model, "mae", (X, T)).gradient()
        found = first_step(model, LevenbergMarquardt(damping=100.0), "mae", T)
        np.testing.assert_allclose(found.step, -gradient / 100.0, rtol=1e-3, atol=1e-7)

    def test_a_callback_over_several_batches(self):
        model = network()
        operator = kg.curvature.GaussNewton(model, "mse", (X, T))
        expected = np.linalg.solve(operator.dense().astype("float64") + 0.1 * np.eye(50), -operator.gradient())
        step = kg.callbacks.NewtonStep(
            (X, T), solver="dense", curvature="gauss_newton", damping=0.1, batch_size=4, every=1
        )
        model.compile(keras.optimizers.SGD(0.0), "mse")
        model.fit(X, T, batch_size=6, verbose=0, callbacks=[step])
        np.testing.assert_allclose(step.last_step.step, expected, rtol=2e-3, atol=1e-4)


class Squares(layers.Layer):
    """The outputs w_1^2 x_1 and w_2^3 x_2, whose second derivatives are 2 x_1 and 6 w_2 x_2. A third weight is idle."""

    def build(self, shape):
        self.w = self.add_weight(shape=(3,), initializer=keras.initializers.Constant(1.5))

    def call(self, x):
        return ops.stack([self.w[0] ** 2 * x[:, 0], self.w[1] ** 3 * x[:, 1]], axis=1)


class TestGeodesicAcceleration:
    @pytest.mark.parametrize("examples", [1, 3])
    def test_bends_the_step(self, examples):
        x, y = np.linspace(1.0, 2.0, 2 * examples).reshape(-1, 2), np.ones((examples, 2))
        model = keras.Sequential([keras.Input((2,)), Squares()])
        w, damping = np.array([1.5, 1.5]), 60.0
        outputs = np.stack([w[0] ** 2 * x[:, 0], w[1] ** 3 * x[:, 1]], axis=1)
        slopes = np.stack([2 * w[0] * x[:, 0], 3 * w[1] ** 2 * x[:, 1]], axis=1)
        # The mean over examples and outputs of r^2 has the diagonal Gauss-Newton matrix mean(J^2) per output.
        g = (slopes * (outputs - y)).mean(axis=0)
        matrix = (slopes**2).mean(axis=0)
        v = -g / (matrix + damping)
        second = np.stack([2 * x[:, 0], 6 * w[1] * x[:, 1]], axis=1) * v**2
        a = -(slopes * second).mean(axis=0) / (matrix + damping)
        assert 2 * np.linalg.norm(a) <= 0.75 * np.linalg.norm(v)
        optimizer = LevenbergMarquardt(damping=damping, geodesic_acceleration=True)
        found = first_step(model, optimizer, "mse", y.astype("float32"), x=x.astype("float32"))
        np.testing.assert_allclose(found.step, [*(v + 0.5 * a), 0.0], rtol=1e-4)

    @pytest.mark.parametrize("length", [0.3, 10.0])
    def test_a_correction_that_is_too_large_is_left_out(self, length):
        # a / v = -(2 w v) (2 v) / (2 w)^2 for each weight w^2 without damping, and -v / w is small or large.
        model = keras.Sequential([keras.Input((2,)), Squares()])
        data = np.ones((1, 2), "float32"), np.ones((1, 2), "float32")
        operator = kg.curvature.GaussNewton(model, "mse", data)
        equation = WeightSpace(operator.dense(), operator.gradient())
        step = np.array([-length, 0.0, 0.0])
        found = GeodesicAcceleration(operator).of(equation, step, 1e-6)
        if length == 10.0:
            assert found is None
        else:
            np.testing.assert_allclose(found, [-length - 0.5 * length**2 / 1.5, 0.0, 0.0], rtol=1e-4)

    def test_batches_with_many_outputs(self):
        trainer = SecondOrder(network())
        trainer.compile(LevenbergMarquardt(geodesic_acceleration=True), "mse")
        x, y = RNG.normal(size=(60, 3)).astype("float32"), RNG.normal(size=(60, 2)).astype("float32")
        history = trainer.fit(x, y, batch_size=60, epochs=5, verbose=0).history["loss"]
        assert all(np.diff(history) <= 0.0) and history[-1] < 0.7 * history[0]


class TestModelsTooLargeForAnEquation:
    @pytest.fixture(autouse=True)
    def small_limits(self, monkeypatch):
        monkeypatch.setattr(normal_equations, "_MOST_WEIGHTS", 10)
        monkeypatch.setattr(normal_equations, "_MOST_NUMBERS", 10)

    def test_conjugate_gradients_solve_it(self):
        model = network()
        operator = kg.curvature.GaussNewton(model, "mse", (X, T))
        matrix, gradient = operator.dense().astype("float64"), operator.gradient()
        found = first_step(model, LevenbergMarquardt(damping=1.0), "mse", T)
        assert found.iterations > 0 and found.attempts == 1
        residual = (matrix + np.eye(len(matrix))) @ found.step + gradient
        assert np.linalg.norm(residual) <= 0.5 * np.linalg.norm(gradient)

    @pytest.mark.parametrize("options", [{"scaling": "diagonal"}, {"geodesic_acceleration": True}])
    def test_options_that_need_the_equation(self, options):
        model = network()
        before = model.get_weights()
        with pytest.raises(ValueError, match="LevenbergMarquardt solves a model of this size by conjugate gradients"):
            first_step(model, LevenbergMarquardt(**options), "mse", T)
        for a, b in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
