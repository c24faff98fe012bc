"""Derivatives of a controlled function, for the tests of this folder."""

import numpy as np
from keras import ops

import keras_gradtools as kg
from tests.cases import tensor


def first_and_second(fun):
    """`x -> (value, first derivative, second derivative)` of a function of a scalar."""

    def derivatives(x):
        with kg.GradientTape() as outer:
            outer.watch(x)
            with kg.GradientTape() as inner:
                inner.watch(x)
                y = fun(x)
            slope = inner.gradient(y, x)
        return y, slope, outer.gradient(slope, x, unconnected_gradients="zero")

    return derivatives


def gradient_of(fun, x):
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = fun(x)
    return tape.gradient(y, x)


def gradient_for(control, upstream, dtype="float32"):
    """What `control` makes of the gradient `upstream`."""
    x = ops.zeros(np.shape(upstream), dtype=dtype)
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = control(x)
    return tape.gradient(y, x, output_gradients=tensor(upstream, dtype))
