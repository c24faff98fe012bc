"""What a forward pass on torch cannot take apart is differentiated by nesting, never left out."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg

if keras.backend.backend() != "torch":
    pytest.skip("these are about torch", allow_module_level=True)

import torch  # noqa: E402

X = np.array([[0.3, 0.7]], "float32")


class Cubed(torch.autograd.Function):
    """The value of sin, and the gradient of x^3."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sin(x)

    @staticmethod
    def backward(ctx, upstream):
        (x,) = ctx.saved_tensors
        return upstream * 3 * x**2


class CubedView(Cubed):
    """The same with a view as its result."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sin(x).view_as(x)


def doubled_by_a_hook(x):
    y = x**3
    y.register_hook(lambda gradient: 2 * gradient)
    return 1.0 * y


def in_place(x):
    y = x**3
    y.mul_(2.0)
    return y


def in_place_on_a_constant(x):
    return torch.zeros(1, 2).add_(x**3)


@pytest.mark.parametrize(
    "fun, factor",
    [
        (Cubed.apply, 6),
        (CubedView.apply, 6),
        (lambda x: 1.0 * Cubed.apply(x), 6),
        (lambda x: Cubed.apply(1.0 * x).view_as(x), 6),
        (doubled_by_a_hook, 12),
        (in_place, 12),
        (in_place_on_a_constant, 6),
        (lambda x: torch.no_grad()(lambda: x**2)() * x**3, None),
    ],
)
def test_second_derivatives(fun, factor):
    expected = factor * X if factor else X**2 * 6 * X
    for _ in range(2):
        np.testing.assert_allclose(ops.convert_to_numpy(kg.laplacian(fun)(X)), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "fun, expected",
    [
        (lambda x, one: torch.sub(other=x**3, input=one), -6 * X),
        (lambda x, one: torch.div(other=x, input=one), 2 / X**3),
        (lambda x, one: torch.sub(other=x**3, input=x**2), 2 - 6 * X),
        (lambda x, one: torch.div(input=x**3, other=one), 6 * X),
    ],
)
def test_arguments_by_name_in_any_order(fun, expected):
    found = kg.laplacian(lambda x: fun(x, torch.ones(1, 2)))(X)
    np.testing.assert_allclose(ops.convert_to_numpy(found), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "transform",
    [kg.laplacian, kg.divergence, lambda f: kg.partial_derivatives(f, [(0, 0)])],
    ids=["laplacian", "divergence", "partial_derivatives"],
)
def test_a_constant_that_changes_after_its_use(transform):
    """As torch's own derivatives, which refuse to read it again."""

    def fun(x):
        factor = torch.ones(1, 2)
        y = x**2 * factor
        factor.add_(1.0)
        return y

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        transform(fun)(X)


def test_a_sum_with_a_constant_that_changes_after_its_use():
    def fun(x):
        term = torch.ones(1, 2)
        y = x**2 + term
        term.add_(1.0)
        return y

    np.testing.assert_allclose(ops.convert_to_numpy(kg.laplacian(fun)(X)), 2 * np.ones((1, 2)))


def test_dropout_without_a_seed_is_not_drawn_again_for_each_operation():
    fun = lambda x: torch.nn.functional.dropout(x**3, 0.5, True)  # noqa: E731
    found = ops.convert_to_numpy(kg.laplacian(fun)(np.full((1, 64), 0.5, "float32")))
    assert set(np.unique(found.round(4))) == {0.0, 6.0}
