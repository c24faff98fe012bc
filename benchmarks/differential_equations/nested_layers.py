"""Layers of derivatives as users write them with gradients alone: each derivative is the gradient of a lower one.

`in_place()` puts them in the place of the package's layers, which compute all derivatives in one pass.
"""

import contextlib
from unittest import mock

from keras import ops

import keras_gradtools as kg


def _along(fun, axis):
    """The derivative of the one output of `fun` by one coordinate, for each example."""
    gradient = kg.grad(lambda x: ops.sum(fun(x)))
    return lambda x: gradient(x)[:, axis : axis + 1]


class Laplacian(kg.layers.Laplacian):
    """A loop over the axes."""

    def derivative(self, fun, x):
        # Compilers compute the gradient once, though it is written in each turn.
        return sum(_along(_along(fun, axis), axis)(x) for axis in self._require_axes(x))


class PartialDerivatives(kg.layers.PartialDerivatives):
    """Nested gradients, one for each order."""

    def derivative(self, fun, x):
        found = []
        for key in self._keys:
            derivative = fun
            for axis in key:
                derivative = _along(derivative, axis)
            found.append(derivative(x))
        return self._named(found)


@contextlib.contextmanager
def in_place():
    """Within the block, `kg.layers` has the layers of this module."""
    with contextlib.ExitStack() as stack:
        for layer in (Laplacian, PartialDerivatives):
            stack.enter_context(mock.patch.object(kg.layers, layer.__name__, layer))
        yield
