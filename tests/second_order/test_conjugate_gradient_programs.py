"""Steps whose conjugate gradients are one program, against those that call one program for each product."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_gradtools import backend
from keras_gradtools.curvature import GaussNewton, Hessian
from keras_gradtools.curvature.operators.operator import CurvatureOperator
from keras_gradtools.models import SecondOrder
from keras_gradtools.optimizers import NewtonCG
from keras_gradtools.second_order.step_solvers import ConjugateGradientsSolver

RNG = np.random.default_rng(5)
X = RNG.normal(size=(30, 4)).astype("float32")
Y = np.sin(2.0 * X[:, :1]) + X[:, 1:2] * X[:, 2:3]


def dense():
    return keras.Sequential([keras.Input((4,)), layers.Dense(6, "tanh"), layers.Dropout(0.2, seed=1), layers.Dense(1)])


def recurrent():
    return keras.Sequential([keras.Input((4,)), layers.Reshape((4, 1)), layers.GRU(3), layers.Dense(1)])


def convolutional():
    return keras.Sequential(
        [keras.Input((4,)), layers.Reshape((4, 1)), layers.Conv1D(3, 2, activation="tanh"), layers.Flatten(),
         layers.Dense(1)]
    )  # fmt: skip


def branching(y, y_pred):
    """Its Python code depends on values, so it cannot be traced."""
    squares = ops.square(y - y_pred)
    return ops.mean(squares, axis=-1) if float(ops.max(squares)) >= 0.0 else ops.zeros(len(y))


@pytest.fixture
def programs(monkeypatch):
    """The keys of the programs with products that were run."""
    found, compute = [], CurvatureOperator.compute_with_product

    def noted(self, what, body, *args):
        found.append(what)
        return compute(self, what, body, *args)

    monkeypatch.setattr(CurvatureOperator, "compute_with_product", noted)
    return found


def trained(build, steps=2, **options):
    model = build()
    draw = np.random.default_rng(1)
    for v in model.trainable_variables:
        v.assign(0.5 * draw.normal(size=v.shape))
    trainer = SecondOrder(model)
    trainer.compile(NewtonCG(**options), "mse")
    return trainer.fit(X, Y, batch_size=len(X), epochs=steps, shuffle=False, verbose=0).history, trainer.last_step.step


@pytest.mark.filterwarnings("error:.*eagerly")
@pytest.mark.parametrize(
    ("build", "options"),
    [
        (dense, {"curvature": "gauss_newton", "preconditioner_rank": 8, "rtol": 1e-3, "damping": 1.0}),
        (dense, {"preconditioner_rank": 0, "progress_tol": 5e-4, "max_iterations": 20}),
        (recurrent, {}),
        (convolutional, {"curvature": "gauss_newton"}),
    ],
)
def test_the_same_steps(build, options, programs, monkeypatch):
    history, step = trained(build, **options)
    # A convolution is slow in a loop of JAX on a CPU, so that its products are programs of their own there.
    is_slow = build is convolutional and backend.slows_in_loops(lambda: [build()(X)])
    assert bool(programs) == (backend.COMPILES_LOOPS and not is_slow)
    monkeypatch.setattr(CurvatureOperator, "can_loop_over_products", lambda self: False)
    programs.clear()
    expected, other = trained(build, **options)
    assert not programs and expected["step_reason"] == history["step_reason"] == [0.0] * 2
    np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-3)
    np.testing.assert_allclose(history["damping"], expected["damping"], rtol=1e-2)
    np.testing.assert_allclose(history["cg_iterations"], expected["cg_iterations"], atol=1)
    np.testing.assert_allclose(step, other, atol=2e-2 * np.abs(other).max())


def test_a_loop_of_products(programs):
    model = dense()
    v = RNG.normal(size=sum(w.size for w in model.get_weights()))
    for cls in (Hessian, GaussNewton):
        operator = cls(model, "mse", (X, Y))
        if not operator.can_loop_over_products():
            assert not backend.COMPILES_LOOPS
            continue

        def twice(product, loss_at, loss_and_gradient, v):
            return [product(product(v)), loss_at(v), *loss_and_gradient()]

        found, *others = operator.compute_with_product("twice", twice, v.astype("float32"))
        matrix = operator.dense().astype("float64")
        expected = matrix @ (matrix @ v)
        np.testing.assert_allclose(ops.convert_to_numpy(found), expected, atol=1e-4 * np.abs(expected).max())
        for value, other in zip(others, (operator.loss(v), *operator.loss_and_gradient()), strict=True):
            np.testing.assert_allclose(ops.convert_to_numpy(value), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inputs", [2**16, 2**16 + 1])
def test_models_of_many_weights_have_no_loop(inputs):
    model = keras.Sequential([keras.Input((inputs,)), layers.Dense(2, use_bias=False)])
    operator = Hessian(model, "mse", (np.zeros((1, inputs), "float32"), np.zeros((1, 2), "float32")))
    assert operator.can_loop_over_products() == (backend.COMPILES_LOOPS and inputs == 2**16)


def test_data_in_several_batches_or_a_model_of_many_variables_has_no_loop():
    assert not Hessian(dense(), "mse", (X, Y), batch_size=15).can_loop_over_products()
    many = keras.Sequential([keras.Input((4,)), *(layers.Dense(4) for _ in range(17)), layers.Dense(1)])
    assert not Hessian(many, "mse", (X, Y)).can_loop_over_products()


@pytest.mark.filterwarnings("ignore:.*eagerly")
def test_a_loss_that_cannot_be_traced():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, "tanh"), layers.Dense(1)])
    operator = Hessian(model, branching, (X, Y))
    solver = ConjugateGradientsSolver(operator, 50, 1e-5)
    _, gradient = solver.start(operator, 3.0, 1.0)
    found = solver.solve(gradient, 3.0).iterates[0].step()
    expected = np.linalg.solve(operator.dense() + 3.0 * np.eye(len(gradient)), -gradient)
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())
