"""The CTC loss on TensorFlow: its values are Keras' own, and its first and second derivatives are right."""

import itertools

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from keras_gradtools import testing
from tests.cases import close, tensor

if keras.config.backend() != "tensorflow":
    pytest.skip("on TensorFlow this loss is written anew", allow_module_level=True)


def by_enumeration(label, logits):
    """The loss as it is defined: over all alignments that come to `label`, blanks being 0."""
    log_p = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    total = 0.0
    for path in itertools.product(range(logits.shape[1]), repeat=len(logits)):
        merged = [k for k, _ in itertools.groupby(path) if k]
        if merged == list(label):
            total += np.exp(sum(log_p[t, k] for t, k in enumerate(path)))
    return -np.log(total)


def recorded(fun, x):
    """The value under a tape, and its gradient."""
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = fun(x)
    return y, tape.gradient(y, x)


@pytest.mark.parametrize("label", [(1,), (1, 2), (2, 2), ()])
def test_is_the_sum_over_all_alignments(label):
    logits = np.random.default_rng(1).normal(size=(4, 3))
    padded = np.zeros((1, 3), "int32")
    padded[0, : len(label)] = label
    loss, _ = recorded(
        lambda x: ops.ctc_loss(padded, x, np.array([len(label)]), np.array([4]))[0], tensor(logits[None])
    )
    close(loss, by_enumeration(label, logits))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_value_and_gradient_are_those_of_keras(dtype):
    import tensorflow as tf

    random = np.random.default_rng(0)
    labels, lengths = random.integers(1, 5, (4, 3)), np.array([3, 1, 0, 2])
    logits = tensor(random.normal(size=(4, 8, 5)), dtype)
    times = np.array([8, 7, 8, 6])

    def loss(logits):
        return ops.ctc_loss(labels, logits, lengths, times)

    with tf.GradientTape() as tape:
        tape.watch(logits)
        expected = loss(logits)
    actual, gradient = recorded(loss, logits)
    assert actual.dtype == expected.dtype
    close(actual, np.asarray(expected), rtol=1e-5)
    close(gradient, np.asarray(tape.gradient(expected, logits)), atol=1e-3 if dtype == "float16" else 1e-6)


def test_a_label_that_does_not_fit_is_impossible():
    loss, _ = recorded(
        lambda x: ops.ctc_loss(np.array([[1, 1]]), x, np.array([2]), np.array([2])), ops.zeros((1, 2, 3))
    )
    close(loss, [np.inf])


@pytest.mark.float64
def test_second_derivatives():
    logits = tensor(np.random.default_rng(0).normal(size=(1, 4, 3)), "float64")

    def loss(logits):
        return ops.sum(ops.ctc_loss(np.array([[2, 2]]), logits, np.array([2]), np.array([4])))

    testing.check_gradients(loss, (logits,), order=2, modes=("reverse",))
    testing.check_hvp(kg.jit(loss), (logits,))
