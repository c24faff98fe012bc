"""The directions of a sum of second derivatives."""

from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_gradtools.transforms.taylor import stacks
from keras_gradtools.transforms.taylor.collapsed import Carried, Sum


class Directions(NamedTuple):
    r"""The sum $\sum_s c_s \, v_s^\top H w_s$ over second derivatives, by its directions in the rows of two arrays.

    `left` has shape `(directions, n)`. `right` is None where $w_s = v_s$, or has that shape, or
    `(batch, directions, n)`. `weights` are the $c_s$, or None for ones.
    """

    left: Any
    right: Any = None
    weights: Any = None

    @property
    def count(self):
        return self.left.shape[0]

    def rows(self):
        """The arrays, with one row for each direction."""
        each = self.right is not None and len(self.right.shape) == 3
        return self.left, ops.moveaxis(self.right, 0, 1) if each else self.right, self.weights

    @staticmethod
    def of_rows(left, right, weights):
        """The directions of some rows of the arrays."""
        each = right is not None and len(right.shape) == 3
        return Directions(left, ops.moveaxis(right, 0, 1) if each else right, weights)

    def start(self, apart=False):
        """What a forward pass carries at the points, and which second derivatives it sums."""
        if self.right is None:
            return Carried(stacks.of_directions(self.left), None, True), Sum(weights=self.weights, apart=apart)
        kind = Sum(pairs=True, apart=apart)
        if len(self.right.shape) == 2:
            both = ops.concatenate([self.left, self.right], axis=0)
            return Carried(stacks.of_directions(both), None, True), kind
        both = ops.concatenate([ops.broadcast_to(self.left, ops.shape(self.right)), self.right], axis=1)
        return Carried(ops.moveaxis(both, 1, stacks.axis(2))), kind

    def pairs(self, x):
        """The two directions of each term for every point of `x`, of shape `(directions, batch, n)`, with weights."""
        shape = (self.count, *ops.shape(x))
        left = self.left[:, None]
        right = left if self.right is None else ops.reshape(self.right, (-1, *self.left.shape))
        right = right if self.right is None else ops.transpose(right, (1, 0, 2))
        if self.weights is not None:
            right = right * self.weights[:, None, None]
        return ops.broadcast_to(left, shape), ops.broadcast_to(right, shape)


def along_axes(x, axes, coefficients=None):
    """The directions of the sum of D_ij d_i d_j over `axes`. By default D is the identity."""
    units = unit_vectors(x, axes)
    if coefficients is None or len(coefficients.shape) == 1:
        return Directions(units, weights=coefficients)
    # The derivatives along rows of the matrix, sum_j D_ij e_j, are carried with those along the axes.
    return Directions(units, ops.matmul(coefficients, units))


def along_vectors(x, axes, vectors, coefficients=None, is_on_axes=False):
    """The directions of v D v, a sum of second derivatives for each row v of `vectors`, of shape (samples, axes).

    `is_on_axes` says that at most one entry of each row is not zero.
    """
    if coefficients is None:
        return Directions(spread(x, axes, vectors))
    if len(coefficients.shape) > 1:
        return Directions(spread(x, axes, vectors), spread(x, axes, ops.matmul(vectors, coefficients)))
    if is_on_axes:
        weights = ops.sum(vectors * vectors * coefficients, axis=1) / ops.sum(vectors * vectors, axis=1)
        return Directions(spread(x, axes, vectors), weights=weights)
    return Directions(spread(x, axes, vectors), spread(x, axes, vectors * coefficients))


def unit_vectors(x, axes):
    """The unit vectors of `axes`, one in each row."""
    units = np.zeros((len(axes), x.shape[1]), "float32")
    units[np.arange(len(axes)), list(axes)] = 1.0
    return ops.convert_to_tensor(units, dtype=x.dtype)


def spread(x, axes, vectors):
    """Vectors with an entry for each of `axes`, in the last axis, as directions of the points, with zeros elsewhere."""
    axes = list(axes)
    if axes == list(range(x.shape[1])):
        return vectors
    places = np.full(x.shape[1], len(axes), "int32")
    places[axes] = np.arange(len(axes))
    padded = ops.concatenate([vectors, ops.zeros_like(vectors[..., :1])], axis=-1)
    return ops.take(padded, ops.convert_to_tensor(places), axis=-1)
