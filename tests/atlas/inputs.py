"""Random arrays, and functions made of operations, for the tables of operations."""

import numpy as np
from keras import ops

_random = np.random.default_rng(7)


def normal(*shape):
    return _random.normal(size=shape)


def positive(*shape):
    return 0.3 + _random.random(size=shape)


def inside(*shape):
    """Between -1 and 1, away from both and from 0."""
    x = _random.uniform(0.2, 0.8, size=shape)
    return x * _random.choice([-1.0, 1.0], size=shape)


def spd(n):
    x = normal(n, n)
    return x @ x.T + n * np.eye(n)


def symmetric(fun):
    """A function of one half of a matrix, given the mean of both."""
    return lambda x: fun((x + ops.swapaxes(x, -1, -2)) / 2)


def many(fun, *arrays):
    """A function of a list of tensors."""
    return (lambda *xs: fun(list(xs))), arrays


def bind(fun, *args, **kwargs):
    return lambda x: fun(x, *args, **kwargs)
