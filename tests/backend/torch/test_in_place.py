"""In-place operations on what a tape follows, and views of what was overwritten: the right value or an error."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from tests.cases import close, tensor

if keras.backend.backend() != "torch":
    pytest.skip("these are about torch", allow_module_level=True)

import torch  # noqa: E402

X = np.array([0.5, -1.0, 2.0])
# Of sin(x^2).
SLOPE = np.cos(X**2) * 2 * X


def base_overwritten(x):
    y = x * x
    first = y[:2]
    y.sin_()
    return first


def seen_in_between(x):
    y = x * x
    first = y[:2]
    y.sin_()
    assert "grad_fn" in repr(first)
    return first


def used_afterwards(x):
    y = x * x
    first = y[:2]
    y.sin_()
    return first * 1.0


def another_view_overwritten(x):
    y = x * x
    first, whole = y[:2], y.view(3)
    whole.sin_()
    return first


def view_of_a_view(x):
    y = x * x
    first = y.view(1, 3)[0][:2]
    y.sin_()
    return first


def filled(x):
    y = torch.zeros(3, dtype=x.dtype)
    first = y[:2]
    y.copy_(ops.sin(x * x))
    return first


def filled_by_index(x):
    y = torch.zeros(2, dtype=x.dtype)
    whole = y.view(2)
    for i in range(2):
        y[i] = ops.sin(x[i] * x[i])
    return whole


RIGHT = [
    base_overwritten,
    seen_in_between,
    used_afterwards,
    another_view_overwritten,
    view_of_a_view,
    filled,
    filled_by_index,
]


@pytest.mark.parametrize("fun", RIGHT)
class TestViews:
    """A view of what is overwritten later has the new value, and its derivative."""

    jacobian = np.diag(SLOPE)[:2]

    @pytest.mark.parametrize("inside", [True, False])
    def test_tape(self, fun, inside):
        x = tensor(X, "float64")
        with kg.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = fun(x)
            found = tape.gradient(y, x) if inside else None
        close(tape.gradient(y, x) if found is None else found, self.jacobian.sum(0))
        close(tape.jvp(y, x, tensor(X, "float64")), self.jacobian @ X)
        close(tape.jacobian(y, x), self.jacobian)

    def test_transforms(self, fun):
        x = tensor(X, "float64")
        close(kg.grad(lambda x: ops.sum(fun(x)))(x), self.jacobian.sum(0))
        close(kg.grad(lambda x: fun(x)[1])(x), self.jacobian[1])
        close(kg.jacobian(fun)(x), self.jacobian)
        close(kg.vjp(fun, x)[1](tensor([1, 2], "float64"))[0], [1, 2] @ self.jacobian)
        close(kg.jvp(fun, (x,), (x,))[1], self.jacobian @ X)

    def test_second_derivative(self, fun):
        x = tensor(X, "float64")
        second = 2 * np.cos(X**2) - 4 * X**2 * np.sin(X**2)
        second[2] = 0
        with kg.GradientTape() as outer:
            outer.watch(x)
            with kg.GradientTape() as tape:
                tape.watch(x)
                y = fun(x)
            slope = tape.gradient(y, x)
        close(outer.gradient(slope, x), second)


class TestSources:
    def test_a_view_overwritten_since_it_was_used(self):
        x = tensor(X, "float64")
        with kg.GradientTape(persistent=True) as tape:
            tape.watch(x)
            h = x * x
            first = h[0]
            y = first * 2
            h.sin_()
        with pytest.raises(RuntimeError, match=r"overwritten in place.*Received: .*float64.*\(\).*keras.ops.copy"):
            tape.gradient(y, first)
        close(tape.gradient(y, x), [2.0, 0, 0])

    def test_a_view_by_itself(self):
        x = tensor(X, "float64")
        with kg.GradientTape() as tape:
            tape.watch(x)
            h = x * x
            first = h[0]
            h.sin_()
        close(tape.gradient(first, [first, x]), [1, [SLOPE[0], 0, 0]])

    def test_an_argument_that_the_function_overwrites(self):
        """It is a view of what was given; where that has a graph, torch lets it be overwritten."""
        leaf = torch.tensor(X, requires_grad=True)
        for x, reason in ((tensor(X), "in-place"), (leaf, "in-place"), (leaf * 1.0, "overwritten in place")):
            with pytest.raises(RuntimeError, match=reason):
                kg.grad(lambda x: ops.sum(x.sin_()))(x)

    def test_a_watched_tensor(self):
        x = tensor(X)
        with kg.GradientTape() as tape:
            tape.watch(x)
            with pytest.raises(RuntimeError, match="in-place"):
                x.sin_()
            with pytest.raises(RuntimeError, match="in-place"):
                x[0].sin_()
            y = x * x
            with torch.no_grad():
                x.mul_(2)
        with pytest.raises(RuntimeError, match="overwritten before the derivative"):
            tape.gradient(y, x)

    def test_a_watched_intermediate_tensor(self):
        """The gradient is that by the value that was watched."""
        leaf = torch.tensor(X, requires_grad=True)
        h = leaf * 1.0
        with kg.GradientTape() as tape:
            tape.watch(h)
            h.sin_()
            y = h * 3
        close(tape.gradient(y, h).detach(), 3 * np.cos(X))


class TestAfterTheBlock:
    def record(self):
        x = tensor(X, "float64")
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = x * x
            first = y[0]
            y.sin_()
        return tape, x, y, first

    def test_a_view_that_was_looked_at(self):
        """torch has told its graph outside of the block: it cannot be told from a view that was made there."""
        tape, x, _, first = self.record()
        assert first.grad_fn is not None
        with pytest.raises(RuntimeError, match="overwritten in place"):
            tape.gradient(first, x)

    def test_a_view_made_there_is_a_constant(self):
        x = tensor(X, "float64")
        with kg.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = x * x
        assert tape.gradient(y[0], x) is None
        y.sin_()
        assert tape.gradient(y, x) is None

    def test_another_thread(self):
        from tests.backend.torch.test_backend import in_thread

        tape, x, _, first = self.record()
        close(in_thread(lambda: tape.gradient(first, x)), [SLOPE[0], 0, 0])
