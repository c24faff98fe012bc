"""An argument that carries a Keras mask, as the output of an embedding does, keeps it inside a transform."""

import contextlib

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools import backend

TOKENS = np.array([[1, 2, 0, 0], [3, 4, 5, 0], [6, 0, 0, 0]], "int32")
IS_TOKEN = TOKENS != 0


@pytest.fixture(scope="module")
def rnn():
    keras.utils.set_random_seed(3)
    rnn = layers.SimpleRNN(2)
    rnn(ops.zeros((1, 4, 3)))
    return rnn


@pytest.fixture
def embedded():
    return layers.Embedding(7, 3, mask_zero=True, embeddings_initializer="normal")(TOKENS)


def loss(y):
    return ops.sum(y**2)


def numbers(x):
    return [ops.convert_to_numpy(y) for y in (x if isinstance(x, (tuple, list)) else [x])]


TRANSFORMS = {
    "value_and_grad": lambda f, h: kg.value_and_grad(lambda h: loss(f(h)))(h),
    "grad of grad": lambda f, h: kg.grad(lambda h: loss(kg.grad(lambda h: loss(f(h)))(h)))(h),
    "jvp": lambda f, h: kg.jvp(f, (h,), (ops.ones_like(h),)),
    "vjp": lambda f, h: kg.vjp(f, h)[1](ops.ones((3, 2)))[0],
    "linearize": lambda f, h: kg.linearize(f, h)[1](ops.ones_like(h)),
    "jacobian, reverse": lambda f, h: kg.jacobian(f, mode="reverse")(h),
    "jacobian, forward": lambda f, h: kg.jacobian(f, mode="forward")(h),
    "batch_jacobian": lambda f, h: kg.batch_jacobian(f)(h),
    "hessian": lambda f, h: kg.hessian(lambda h: loss(f(h)))(h),
    "hvp": lambda f, h: kg.hvp(lambda h: loss(f(h)), (h,), (ops.ones_like(h),))[0],
}


# All of them reach the function by the same few kernels as the others.
LIKE_OTHERS = ("value_and_grad", "jacobian, reverse", "batch_jacobian", "hessian")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.fast_on("torch") if n in LIKE_OTHERS else ()) for n in TRANSFORMS]
)
def test_is_that_of_the_mask_given_by_hand(name, rnn, embedded):
    transform = TRANSFORMS[name]
    by_hand = numbers(transform(lambda h: rnn(h, mask=ops.convert_to_tensor(IS_TOKEN)), ops.copy(embedded)))
    for found, expected in zip(numbers(transform(lambda h: rnn(h), embedded)), by_hand, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_a_mask_changes_every_value(rnn, embedded):
    """Or the comparison above would show nothing."""
    with_mask, without = numbers([rnn(embedded), rnn(ops.copy(embedded))])
    assert np.abs(with_mask - without).min() > 1e-4


def test_padding_has_no_gradient(rnn, embedded):
    (gradient,) = numbers(kg.grad(lambda h: loss(rnn(h)))(embedded))
    assert np.all(gradient[~IS_TOKEN] == 0) and np.all(np.any(gradient[IS_TOKEN] != 0, axis=-1))


def test_jit_runs_eagerly(rnn, embedded):
    compiled = kg.jit(lambda h: rnn(h))
    warning = pytest.warns(UserWarning, match="an argument has a Keras mask, which a compiled program would not see")
    with warning if backend.may_compile() else contextlib.nullcontext():
        found = compiled(embedded)
    for y, h in ((found, embedded), (compiled(ops.copy(embedded)), ops.copy(embedded))):
        np.testing.assert_allclose(*numbers([y, rnn(h)]), rtol=1e-5, atol=1e-6)


def test_each_call_has_its_own_mask(rnn, embedded):
    # A program that was compiled for arguments of this shape without a mask is not used for one with a mask.
    jacobian = kg.jacobian(lambda h: rnn(h))
    without, (with_mask,) = numbers(jacobian(ops.copy(embedded)))[0], numbers(jacobian(embedded))
    again = numbers(jacobian(ops.copy(embedded)))[0]
    np.testing.assert_allclose(without, again, rtol=1e-5, atol=1e-7)
    assert np.all(with_mask[0, :, 0, 2:] == 0) and np.any(without[0, :, 0, 2:] != 0)
