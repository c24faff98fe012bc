"""What is begun is ended, wherever an interrupt comes: tapes, transforms, scopes, and steps of the weights."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.blocks import Block
from keras_gradtools.curvature import Hessian
from keras_gradtools.keras_state import recording
from keras_gradtools.keras_state.scopes import StateScope, outside_scopes
from tests.interrupts import Interrupt, at_every_point, left_behind

HERE = (
    "blocks.py", "recording.py", "tape.py", "graph.py", "trace.py", "gradient_tape.py",
    "borrowing.py", "windows.py", "backward_pass.py", "backend/torch/backend.py", "backend/jax/backend.py",
    "backend/tensorflow/backend.py", "random_numbers.py", "scopes.py", "seeds.py", "taped_call.py",
)  # fmt: skip
X = np.array([1.0, 2.0], "float32")


class Nested(Block):
    """Two changes, of which each has to be undone."""

    def __init__(self):
        self.first, self.second = [], []

    def begin(self):
        self.first.append(1)
        self.second.append(1)

    def end(self):
        self.second.clear()
        self.first.clear()


def test_a_block_undoes_all_of_it_wherever_it_is_interrupted():
    block = Nested()

    def run():
        with block:
            assert block.first and block.second

    points = 0
    for _ in at_every_point(run, ("blocks.py", "test_blocks.py")):
        assert not block.first and not block.second
        points += 1
    assert points > 5


def in_a_tape(x, v):
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = ops.sum(x * v * x)
        with tape.stop_recording():
            ops.square(y)
    tape.gradient(y, [x, v])


def in_nested_tapes(x, v):
    with kg.GradientTape() as outer:
        outer.watch(x)
        with kg.GradientTape(persistent=True) as inner:
            inner.watch(x)
            y = ops.sum(x * v * x)
        dy = inner.gradient(y, x)
    outer.gradient(dy, x)


def in_a_transform(x, v):
    kg.grad(lambda x: ops.sum(x * v * x))(x)


def in_a_product(x, v):
    kg.hvp(lambda x: ops.sum(x * v * x), (x,), (x,))


def in_scopes(x, v):
    with StateScope([(v, x)]), outside_scopes(), recording.ReadLog():
        v * x


@pytest.mark.parametrize("run", [in_a_tape, in_nested_tapes, in_a_transform, in_a_product, in_scopes])
def test_an_interrupt_leaves_nothing_behind(run):
    x = ops.convert_to_tensor(X)
    v = keras.Variable(X)
    run(x, v)
    points = 0
    for point in at_every_point(lambda: run(x, v), HERE, every=3):
        assert not left_behind(), f"interrupted at point {point}"
        assert not getattr(x, "requires_grad", False)
        points += 1
    assert points > 5
    # And derivatives are what they were.
    np.testing.assert_allclose(ops.convert_to_numpy(kg.grad(lambda x: ops.sum(x * v * x))(x)), 2 * X * X)


def test_an_interrupt_inside_of_a_pass_of_many_cotangents(backend):
    """torch counts such passes; one that it would go on to count refuses random numbers from then on."""
    files = HERE if backend != "torch" else (*HERE, "levels.py", "torch/_vmap_internals.py")
    x = ops.convert_to_tensor(X)

    def run():
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = ops.tanh(x) * x
        tape.jacobian(y, x)

    run()
    for point in at_every_point(run, files):
        assert not left_behind(), f"interrupted at point {point}"
    keras.random.normal((2,))


def dense():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2, "tanh"), layers.BatchNormalization(), layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def test_a_move_is_whole_or_none():
    model = dense()
    hessian = Hessian(model, "mse", (np.ones((4, 2), "float32"), np.ones((4, 1), "float32")), verbose=0)
    offset = np.ones(hessian.shape[0], "float32")
    before = [w.copy() for w in model.get_weights()]
    moved = 0
    for _ in at_every_point(lambda: hessian.move(offset), ("curvature/operator.py", "parameters.py", "state.py")):
        changed = {bool((w != b).any()) for w, b in zip(model.get_weights(), before, strict=True) if b.shape != (2,)}
        assert changed == {False} or changed == {True}
        moved += changed == {True}
        model.set_weights(before)
    # What comes after the last assignment is no reason to undo it.
    assert moved <= 30
    model.set_weights(before)
    hessian.move(offset)
    np.testing.assert_allclose(model.get_weights()[0], before[0] + 1, rtol=1e-6)


def test_a_failing_assignment_moves_nothing(monkeypatch):
    model = dense()
    hessian = Hessian(model, "mse", (np.ones((4, 2), "float32"), np.ones((4, 1), "float32")), verbose=0)
    before = [w.copy() for w in model.get_weights()]
    last = model.trainable_variables[-1]
    assign, calls = type(last).assign, []

    def failing(self, value):
        if self is last and not calls:
            calls.append(self)
            raise Interrupt
        return assign(self, value)

    monkeypatch.setattr(type(last), "assign", failing)
    with pytest.raises(Interrupt):
        hessian.move(np.ones(hessian.shape[0], "float32"))
    assert calls
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_failing_step_of_a_second_order_method_changes_nothing(monkeypatch):
    model = kg.models.SecondOrder(dense())
    model.compile(kg.optimizers.NewtonCG(max_iterations=3), "mse", metrics=["mae"])
    x, y = np.random.default_rng(0).normal(size=(8, 2)).astype("float32"), np.ones((8, 1), "float32")
    model.fit(x, y, verbose=0, batch_size=8)
    variables = [*model.variables, *model.optimizer.variables]
    before = [ops.convert_to_numpy(v).copy() for v in variables]

    def failing(operator, damping):
        raise Interrupt

    monkeypatch.setattr(model.optimizer, "end_step", failing)
    with pytest.raises(Interrupt):
        model.fit(x, y, verbose=0, batch_size=8)
    for old, v in zip(before, variables, strict=True):
        np.testing.assert_array_equal(old, ops.convert_to_numpy(v), err_msg=v.path)
    monkeypatch.undo()
    model.fit(x, y, verbose=0, batch_size=8)
    assert any((old != ops.convert_to_numpy(v)).any() for old, v in zip(before, variables, strict=True))
