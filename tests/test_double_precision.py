"""Double precision in the operations of Keras, which otherwise round to single precision on JAX and torch."""

import pathlib
import re

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.keras_state import precision
from keras_gradtools.second_order.normal_equations import NormalEquations

X = np.linspace(-1.0, 1.0, 40)[:, None]


def state():
    table = precision.current()
    return table.floatx, keras.config.dtype_policy().name, table.results, keras.backend.result_type("float64", "int32")


def network(units=8):
    model = keras.Sequential([keras.Input((1,)), layers.Dense(units, "tanh"), layers.Dense(1)])
    draw = np.random.default_rng(0)
    model.set_weights([draw.normal(size=w.shape) for w in model.get_weights()])
    return model


@pytest.mark.float64
class TestBlock:
    def test_products_and_means_are_in_double_precision(self):
        x = np.array([[1.0, 1e-12]])
        with kg.double_precision():
            found = ops.matmul(ops.convert_to_tensor(x), ops.ones((2, 1)))
            assert keras.backend.standardize_dtype(found.dtype) == "float64"
            assert float(ops.mean(found)) == 1.0 + 1e-12
            assert float(ops.sum(ops.gelu(ops.convert_to_tensor([1e-12])))) == pytest.approx(5e-13, rel=1e-10)

    def test_new_objects_are_in_double_precision(self):
        with kg.double_precision():
            assert network().compute_dtype == "float64"
            assert keras.metrics.Mean().dtype == keras.losses.MeanSquaredError().dtype == "float64"
            assert ops.zeros(()).dtype == ops.convert_to_tensor(1.0, "float64").dtype
        assert network().compute_dtype == "float32"

    def test_everything_is_restored(self):
        before = state()
        with kg.double_precision():
            with kg.double_precision():
                assert state() != before
            assert keras.config.floatx() == "float64"
        assert state() == before
        with pytest.raises(ZeroDivisionError), kg.double_precision():
            _ = 1 / 0
        assert state() == before

    def test_a_policy_of_the_user_is_restored(self):
        policy = keras.config.dtype_policy()
        try:
            keras.config.set_dtype_policy("mixed_bfloat16")
            with kg.double_precision():
                assert keras.config.dtype_policy().name == "float64"
            assert keras.config.dtype_policy().name == "mixed_bfloat16"
        finally:
            keras.config.set_dtype_policy(policy)

    def test_the_policy_still_follows_floatx_if_it_did(self):
        given = precision.current()
        try:
            precision.restore(given._replace(policy=None))
            with kg.double_precision():
                network()
            assert precision.current().policy is None
        finally:
            precision.restore(given)


@pytest.mark.float64
class TestDerivatives:
    def test_are_exact_to_ten_digits(self):
        with kg.double_precision():
            model = network()
            w, b, v, c = model.get_weights()
            h = np.tanh(X @ w + b)
            x = ops.convert_to_tensor(X)
            np.testing.assert_allclose(ops.convert_to_numpy(model(x)), h @ v + c, rtol=1e-12)
            second = (-2 * h * (1 - h**2) * w**2) @ v
            np.testing.assert_allclose(ops.convert_to_numpy(kg.laplacian(model)(x)), second, rtol=1e-10, atol=1e-12)
            jacobian = kg.batch_jacobian(model)(x)[:, :, 0]
            np.testing.assert_allclose(ops.convert_to_numpy(jacobian), ((1 - h**2) * w) @ v, rtol=1e-10, atol=1e-12)

    def test_a_gradient_by_the_weights(self):
        with kg.double_precision():
            model = network()
            w, b, v, c = model.get_weights()
            h = np.tanh(X @ w + b)
            rest = h @ v + c - np.sin(X)
            found = kg.curvature.GaussNewton(model, "mse", (X, np.sin(X))).gradient()
            expected = [(X.T @ (rest @ v.T * (1 - h**2))), (rest @ v.T * (1 - h**2)).sum(0), h.T @ rest, rest.sum(0)]
            expected = np.concatenate([2 / len(X) * part.ravel() for part in expected])
            np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-13)

    def test_programs_from_outside_the_block_are_not_used_in_it(self):
        policy = keras.DTypePolicy("float64")
        model = keras.Sequential([keras.Input((1,), dtype="float64"), layers.Dense(8, "tanh", dtype=policy)])
        x = ops.convert_to_tensor(X, "float64")
        kg.batch_jacobian(model)(x)
        w, b = model.get_weights()
        expected = (1 - np.tanh(X @ w + b) ** 2) * w
        with kg.double_precision():
            found = ops.convert_to_numpy(kg.batch_jacobian(model)(x))[:, :, 0]
        np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.float64
class TestFit:
    def test_a_regression_falls_below_single_precision(self):
        y = np.tanh(2 * X)
        with kg.double_precision():
            trainer = kg.models.SecondOrder(network(2))
            trainer.compile(kg.optimizers.LevenbergMarquardt(), "mse")
            loss = trainer.fit(X, y, batch_size=40, epochs=25, verbose=0).history["loss"][-1]
            found = trainer.predict(X, verbose=0)
        assert loss < 1e-20 and found.dtype == "float64"
        np.testing.assert_allclose(found, y, rtol=0, atol=1e-10)

    def test_residuals_of_an_equation(self):
        """u'' = -8 u (1 - u^2) with given ends, whose solution is u = tanh(2 x)."""
        u = np.tanh(2 * X)

        def residuals(model, data):
            points, values = data
            slope = -8.0 * values["inside"] * (1.0 - values["inside"] ** 2)
            equation = kg.laplacian(model)(points["inside"]) - slope
            return {"equation": equation, "boundary": model(points["ends"]) - values["ends"]}

        with kg.double_precision():
            model = network(2)
            trainer = kg.models.SecondOrder(model)
            trainer.compile(kg.optimizers.LevenbergMarquardt(), kg.losses.SquaredResiduals(residuals))
            points, values = ({"inside": a, "ends": a[[0, -1]]} for a in (X, u))
            assert trainer.fit(points, values, epochs=25, verbose=0).history["loss"][-1] < 1e-14
            found = model.predict(X, verbose=0)
        np.testing.assert_allclose(found, u, rtol=0, atol=1e-7)

    def test_residuals_that_mix_points_a_little(self):
        def residuals(model, x):
            u = model(x)
            return u + 1e-4 * ops.mean(u) - 1.0

        with kg.double_precision():
            operator = kg.curvature.GaussNewton(network(2), kg.losses.SquaredResiduals(residuals), X)
            equations = NormalEquations(operator)
            _, gradient, _ = equations.of(operator)
            assert not equations._is_possible
            np.testing.assert_allclose(gradient, operator.gradient(), rtol=1e-10)

    @pytest.mark.slow
    def test_the_equation_of_the_page(self):
        """The lines of docs/second_order.md, which end with an assertion about the error."""
        page = (pathlib.Path(__file__).resolve().parent.parent / "docs" / "second_order.md").read_text(encoding="utf-8")
        (block,) = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
        exec(block, {})

    def test_adam_and_the_logs(self):
        with kg.double_precision():
            model = network()
            model.compile(keras.optimizers.SGD(1e-9), "mse")
            before = np.mean((ops.convert_to_numpy(model(X)) - X) ** 2)
            found = model.fit(X, X, batch_size=40, verbose=0).history["loss"][0]
            assert found == pytest.approx(before, rel=1e-12)


def test_jax_says_what_to_do_without_double_precision(backend):
    if backend != "jax":
        pytest.skip("the other frameworks always have double precision")
    import jax

    before = state()
    with jax.enable_x64(False), pytest.raises(RuntimeError, match="JAX_ENABLE_X64=1"):
        kg.double_precision()
    assert state() == before
