"""The CTC loss by its definition, the sum over all alignments, with its first and second derivative."""

import itertools

import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from tests.cases import close, tensor


def by_enumeration(label, logits):
    """The loss of one example, the blank being 0."""
    log_p = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    total = 0.0
    for path in itertools.product(range(logits.shape[1]), repeat=len(logits)):
        if [k for k, _ in itertools.groupby(path) if k] == list(label):
            total += np.exp(sum(log_p[t, k] for t, k in enumerate(path)))
    return -np.log(total)


def loss(label, count, logits):
    padded = np.zeros((1, 3), "int32")
    padded[0, : len(label)] = label
    return ops.ctc_loss(padded, logits[None], np.array([len(label)]), np.array([count]))[0]


# Where all logits are equal, so are the likelihoods of many alignments.
@pytest.mark.parametrize(
    "logits", [np.zeros((4, 3)), np.random.default_rng(1).normal(size=(4, 3))], ids=["ties", "any"]
)
@pytest.mark.parametrize("label", [(1,), (1, 2), (2, 2), ()])
def test_derivatives(label, logits):
    v = np.random.default_rng(2).normal(size=logits.shape)
    h = 1e-3
    low, value, high = (by_enumeration(label, logits + step * v) for step in (-h, 0.0, h))

    found, gradient = kg.value_and_grad(lambda x: loss(label, 4, x))(tensor(logits))
    (product,) = kg.hvp(lambda x: loss(label, 4, x), (tensor(logits),), (tensor(v),))

    close(found, value)
    close(ops.sum(gradient * v), (high - low) / (2 * h), rtol=1e-4, atol=1e-4)
    close(ops.sum(product * v), (high - 2 * value + low) / h**2, rtol=1e-4, atol=1e-4)


def test_in_a_compiled_step():
    logits = np.zeros((4, 3))
    by_hand = kg.grad(lambda x: loss((1, 2), 4, x))(tensor(logits))
    close(kg.jit(kg.grad(lambda x: loss((1, 2), 4, x)))(tensor(logits)), ops.convert_to_numpy(by_hand))
