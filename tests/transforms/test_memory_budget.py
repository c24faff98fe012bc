"""Jacobians by as many rows as fit into a memory budget."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools import backend, memory
from keras_gradtools.tape import jacobian_plans
from tests.cases import close, tensor

MATRIX = np.random.default_rng(0).normal(size=(6, 6))


@pytest.fixture
def rows(monkeypatch):
    """The numbers of rows at a time that were chosen. None for all of them."""
    chosen, rows_within = [], jacobian_plans.Plan.rows_within
    monkeypatch.setattr(
        jacobian_plans.Plan, "rows_within", lambda *args: chosen.append(rows_within(*args)) or chosen[-1]
    )
    return chosen


def sines(x):
    return ops.sin(ops.matmul(tensor(MATRIX), x))


def jacobian_of_sines(x):
    return np.cos(MATRIX @ x)[:, None] * MATRIX


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize(("budget", "expected"), [(1, 1), (10**9, None), (None, None)])
def test_the_value_is_the_same(mode, budget, expected, rows):
    x = np.linspace(-1.0, 1.0, 6)
    found = kg.jacobian(sines, mode=mode, chunk_size="auto", memory_budget=budget)(tensor(x))
    close(found, jacobian_of_sines(x))
    assert rows == [expected]


def test_some_rows_fit(rows):
    x = np.linspace(-1.0, 1.0, 6)
    transformed = kg.jacobian(sines, memory_budget=400)
    close(transformed(tensor(x)), jacobian_of_sines(x))
    # At least 2 vectors of 6 numbers are computed, of 24 bytes each. The conversion of the matrix may count as well.
    assert rows[0] in (1, 2)


@pytest.mark.parametrize(
    ("mode", "budget", "expected"),
    [
        # What is computed takes 1000 bytes. A row of the Jacobian takes 2000 and the 12 of the source, a column the 40
        # of the target.
        ("reverse", 1000 + 3 * 2012, 3),
        ("reverse", 1000 + 3 * 2012 - 1, 2),
        ("reverse", 10, 1),
        ("reverse", 1000 + 9 * 2012, 9),
        ("reverse", 1000 + 10 * 2012, None),
        ("forward", 1000 + 2 * 2040, 2),
        ("forward", 1000 + 2 * 2040 - 1, 1),
        ("forward", 1000 + 3 * 2040, None),
    ],
)
def test_how_many_rows_fit(mode, budget, expected):
    plan = jacobian_plans.Plan([tensor(np.ones(10))], [tensor(np.ones(3))], mode)
    assert plan.rows_within(budget, 1000) == expected


@pytest.mark.parametrize("compiler", [lambda fun: fun, kg.jit], ids=["eager", "compiled"])
def test_hessian(compiler, rows):
    def energy(x):
        return ops.sum(ops.sin(x) * ops.flip(x))

    x = np.array([0.3, -1.0, 2.0, 0.7])
    expected = np.diag(-np.sin(x) * x[::-1]) + np.fliplr(np.diag(np.cos(x) + np.cos(x)[::-1]))
    for _ in range(4):
        close(compiler(kg.hessian(energy, memory_budget=1))(tensor(x)), expected)
    assert set(rows) == {1}


def test_batch_jacobian_of_a_model_with_state(rows):
    keras.utils.set_random_seed(0)
    stack = [layers.Dense(5, "tanh"), layers.BatchNormalization(), layers.Dropout(0.5, seed=3), layers.GaussianNoise(1)]
    model = keras.Sequential([keras.Input((3,)), *stack, layers.Dense(4)])
    x = keras.random.normal((6, 3), seed=1)
    seeds = [layer.seed_generator.state for layer in stack[2:]]
    before = [ops.convert_to_numpy(v.value).copy() for v in (*model.variables, *seeds)]
    for training in (False, True):
        fun = lambda x, training=training: model(x, training=training)  # noqa: E731
        expected = ops.convert_to_numpy(kg.batch_jacobian(fun)(x))
        close(kg.batch_jacobian(fun, chunk_size="auto", memory_budget=1)(x), expected)
    assert rows == [1, 1]
    after = [ops.convert_to_numpy(v.value) for v in (*model.variables, *seeds)]
    assert all(map(np.array_equal, after, before))


def test_it_is_chosen_once(rows):
    transformed = kg.jacobian(sines, chunk_size="auto")
    x = np.linspace(-1.0, 1.0, 6)
    for i in range(3):
        close(transformed(tensor(x + i)), jacobian_of_sines(x + i))
    assert rows == [None]
    kg.jacobian(lambda x: sines(x)[:3], chunk_size="auto")(tensor(x))
    assert rows == [None, None]


def test_a_function_that_takes_its_own_jacobian():
    def fun(x, depth):
        if depth:
            return ops.sum(kg.jacobian(fun, memory_budget=1)(x, depth - 1), -1)
        return x**3

    x = np.array([1.0, 2.0])
    close(kg.jacobian(fun, memory_budget=1)(tensor(x), 1), np.diag(6 * x))


def test_has_aux_and_chosen_inputs(rows):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4)])
    x = {"a": tensor(np.ones((2, 3))), "b": tensor(np.ones((2, 3)))}

    def fun(x):
        return model(x["a"] * x["b"]), {"sum": ops.sum(x["a"])}

    found, aux = kg.batch_jacobian(fun, inputs="a", has_aux=True, memory_budget=1)(x)
    close(found["a"], np.broadcast_to(ops.convert_to_numpy(model.layers[0].kernel).T, (2, 4, 3)))
    close(aux["sum"], 6.0)
    assert found["b"] is None and rows == [1]


@pytest.mark.parametrize("shape", [(0, 3), (2, 3)])
def test_nothing_to_compute(shape, rows):
    found = kg.batch_jacobian(lambda x: ops.zeros((ops.shape(x)[0], 0)) * ops.sum(x), memory_budget=1)(
        tensor(np.ones(shape))
    )
    assert tuple(found.shape) == (shape[0], 0, 3)


class TestExamples:
    @pytest.mark.parametrize("compiler", [lambda fun: fun, kg.jit], ids=["eager", "compiled"])
    @pytest.mark.parametrize("options", [{"chunk_size": 3}, {"memory_budget": 1}, {"chunk_size": "auto"}], ids=str)
    def test_gradients(self, options, compiler):
        x, y = np.random.default_rng(0).normal(size=(2, 7, 4))
        w = np.array([1.0, -2.0, 0.5, 3.0])

        def loss(weights, x, y):
            residual = ops.sum(weights["w"] * x, -1) - ops.sum(y, -1)
            return ops.mean(residual**2), {"residual": residual[0]}

        transformed = compiler(kg.per_example_grad(loss, has_aux=True, **options))
        weights = {"w": tensor(w), "none": tensor([1.0])}
        residual = x @ w - y.sum(-1)
        for _ in range(4):
            found, aux = transformed(weights, tensor(x), tensor(y))
            close(found["w"], 2 * residual[:, None] * x, rtol=1e-4)
            close(found["none"], np.zeros((7, 1)))
            close(aux["residual"], residual, rtol=1e-4)

    def test_a_model(self):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((5, 3)), layers.LSTM(4), layers.Dense(2)])
        fun, weights = kg.functionalize(model)
        x = keras.random.normal((5, 5, 3), seed=1)

        def loss(weights, x):
            return ops.sum(fun(weights, x) ** 2)

        expected = [ops.convert_to_numpy(g) for g in kg.per_example_grad(loss)(weights, x)]
        close(kg.per_example_grad(loss, chunk_size=2)(weights, x), expected)
        close(kg.per_example_grad(loss, memory_budget=10)(weights, x), expected)

    @pytest.mark.parametrize("count", [0, 1])
    def test_few_examples(self, count):
        transformed = kg.per_example_grad(lambda w, x: ops.sum(w * x**2), chunk_size="auto")
        x = np.full((count, 2), 3.0)
        close(transformed(tensor([1.0, 2.0]), tensor(x)), x**2)

    def test_how_many_fit(self, monkeypatch):
        sizes = []
        map_chunks = backend.map_chunks
        monkeypatch.setattr(
            backend, "map_chunks", lambda fun, count, size: sizes.append(size) or map_chunks(fun, count, size)
        )
        x = tensor(np.ones((50, 1000)))
        # The product and its sum take 4004 bytes, their derivatives as much, and a gradient 4000.
        for budget, expected in ((50_000, 4), (13_000, 1), (200_000, 16)):
            kg.per_example_grad(lambda w, x: ops.sum(w * x), memory_budget=budget)(tensor(np.ones(1000)), x)
            # What only reshapes counts on JAX.
            assert expected / 4 <= sizes[-1] <= expected


@pytest.mark.parametrize(
    "transform", [kg.jacobian, kg.batch_jacobian, kg.hessian, kg.per_example_grad, kg.laplacian, kg.divergence]
)
def test_bad_input(transform):
    name = transform.__name__
    with pytest.raises(ValueError, match=f'{name} expects a positive integer, "auto", or None, as `chunk_size`'):
        transform(ops.sin, chunk_size="all")
    with pytest.raises(ValueError, match=f"{name} expects a positive integer"):
        transform(ops.sin, chunk_size=0)
    with pytest.raises(ValueError, match=f"{name} expects a positive integer, or None, as `memory_budget`"):
        transform(ops.sin, memory_budget=1.5e9)
    with pytest.raises(ValueError, match="A memory budget chooses the number of rows: give one of them"):
        transform(ops.sin, chunk_size=4, memory_budget=10**6)


def test_computed_bytes():
    x = tensor(np.ones((10, 4)))
    # 160 bytes for each of three tensors, and 4 for the sum.
    counted = backend.computed_bytes(lambda: [ops.sum(ops.sin(ops.cos(ops.exp(x))))])
    assert 484 <= counted <= 500
    layer = layers.GRU(4)
    layer.build((2, 5, 4))
    of = {n: backend.computed_bytes(lambda n=n: [layer(tensor(np.ones((2, n, 4))))]) for n in (5, 50)}
    assert 5 < of[50] / of[5] < 12


def test_the_budget_is_a_share_of_what_is_free():
    assert 0 < memory.budget() < memory.free_bytes()
    assert memory.machine_bytes() >= 2**28
