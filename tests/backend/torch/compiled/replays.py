"""Functions that are compiled, and compared with the same functions run eagerly."""

import warnings

import keras
import numpy as np
import torch

import keras_gradtools as kg
from keras_gradtools.keras_internals import scopes


def counted(fun):
    """`fun`, and a list to which each of its runs in Python adds an entry."""
    runs = []

    def call(*args):
        runs.append(1)
        return fun(*args)

    return call, runs


def outcomes(make, arguments, compile=lambda fun: fun):  # noqa: A002
    """The results of the calls of a new function `make()`, as lists of arrays, and how often its Python ran."""
    keras.utils.set_random_seed(3)
    # Keras 3.10 keeps the state of its global generator.
    scopes.global_state.set_global_attribute("global_seed_generator", None)
    fun, runs = counted(make())
    fun = compile(fun)
    return [[_array(x) for x in keras.tree.flatten(fun(*args))] for args in arguments], len(runs)


def _array(x):
    return x.detach().numpy().copy() if isinstance(x, torch.Tensor) else x


def assert_equal_to_eager(make, arguments, runs=2):
    """Each compiled call gives exactly what the eager call gives, and Python runs only so often. None: at each call."""
    expected, _ = outcomes(make, arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if runs is None else "error")
        found, count = outcomes(make, arguments, kg.jit)
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
    assert count == (len(arguments) if runs is None else runs)


def several(*shape, count=5):
    """The arguments of `count` calls: a tensor of normally distributed numbers each."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(*shape, generator=generator),) for _ in range(count)]
