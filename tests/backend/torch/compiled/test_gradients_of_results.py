"""Results of compiled functions on torch can be differentiated by torch, to any order, like those of eager ones."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from tests.cases import close

if keras.backend.backend() != "torch":
    pytest.skip("these are about torch", allow_module_level=True)

import torch  # noqa: E402

X = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.25, -0.75]])


def model(*more):
    return keras.Sequential([layers.Input((3,)), layers.Dense(4, activation="tanh"), *more, layers.Dense(2)])


def gradients(loss, variables):
    for v in variables:
        v.value.grad = None
    loss.backward()
    return [v.value.grad.clone() for v in variables]


def test_backward():
    m = model()
    compiled = kg.jit(lambda x: ops.sum(m(x) ** 2))
    expected = gradients(ops.sum(m(X) ** 2), m.trainable_variables)
    for _ in range(4):
        for found, e in zip(gradients(compiled(X), m.trainable_variables), expected, strict=True):
            assert torch.equal(found, e)


def test_through_a_gradient():
    m = model()
    slope = kg.grad(lambda x: ops.sum(m(x) ** 2))
    compiled = kg.jit(slope)
    w = m.trainable_variables[0]
    (expected,) = gradients(ops.sum(slope(X) ** 2), [w])
    for _ in range(4):
        (found,) = gradients(ops.sum(compiled(X) ** 2), [w])
        assert torch.equal(found, expected)


def test_of_an_argument_to_the_third_order():
    compiled = kg.jit(lambda x: ops.sum(x**4))
    for _ in range(4):
        x = torch.tensor([1.0, 2.0], requires_grad=True)
        (first,) = torch.autograd.grad(compiled(x), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
        (third,) = torch.autograd.grad(second.sum(), x)
        close(first.detach(), [4.0, 32.0])
        close(second.detach(), [12.0, 48.0])
        close(third, [24.0, 48.0])


def test_an_argument_that_depends_on_a_weight():
    """The path through the argument and that through the weight are each counted once."""
    v = keras.Variable([1.0, 2.0, 3.0])
    compiled = kg.jit(lambda x, y: ops.sum(x * y * v))
    for _ in range(4):
        x = v.value * 2
        (found,) = torch.autograd.grad(compiled(x, x * x), v.value)
        close(found, 8 * 4 * np.array([1.0, 2.0, 3.0]) ** 3)  # of 8 v^4


def test_several_results_and_unused_ones():
    compiled = kg.jit(lambda x: (x**2, x**3, ops.stop_gradient(x)))
    for _ in range(4):
        x = torch.tensor([1.0, 2.0], requires_grad=True)
        square, cube, constant = compiled(x)
        assert not constant.requires_grad
        (found,) = torch.autograd.grad(cube.sum(), x, retain_graph=True)
        close(found, [3.0, 12.0])
        (found,) = torch.autograd.grad((square + cube).sum(), x)
        close(found, [5.0, 16.0])


@pytest.mark.parametrize("seed", [3, None])
def test_the_mask_and_the_statistics_of_the_call(seed):
    def train(compile):  # noqa: A002
        keras.utils.set_random_seed(1)
        m = model(layers.BatchNormalization(), layers.Dropout(0.5, seed=seed))
        loss = compile(lambda x: ops.sum(m(x, training=True) ** 2))
        found = []
        for _ in range(5):
            value = loss(X)
            # Other draws in between must not matter.
            loss(X + 1)
            found.append(gradients(value, m.trainable_variables))
        return found, m.get_weights()

    (eager, state), (compiled, own_state) = train(lambda f: f), train(kg.jit)
    for a, b in zip(eager, compiled, strict=True):
        for e, c in zip(a, b, strict=True):
            assert torch.equal(e, c)
    for a, b in zip(state, own_state, strict=True):
        np.testing.assert_array_equal(a, b)


def test_overwritten_weights_are_an_error():
    m = model()
    compiled = kg.jit(lambda x: ops.sum(m(x) ** 2))
    for _ in range(3):
        loss = compiled(X)
    m.set_weights([2 * w for w in m.get_weights()])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_gradient_of_a_custom_gradient():
    reversed_gradient = kg.jit(lambda x: kg.reverse_gradient(x**2))
    for _ in range(4):
        x = torch.tensor([1.0, 2.0], requires_grad=True)
        (found,) = torch.autograd.grad(reversed_gradient(x).sum(), x)
        close(found, [-2.0, -4.0])


def test_a_function_whose_result_is_differentiated_runs_eagerly():
    """A program would compute the forward pass twice."""
    runs = []

    def fun(x):
        runs.append(1)
        return ops.sum(x**2)

    compiled = kg.jit(fun)
    for _ in range(6):
        x = torch.tensor([1.0, 2.0], requires_grad=True)
        compiled(x).backward()
        close(x.grad, [2.0, 4.0])
    # Two calls are recorded, the gradient of the third one runs it again, and the others run eagerly.
    assert len(runs) == 6
