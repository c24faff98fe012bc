"""The penalty in NumPy, in double precision: input gradients by complex steps, those of the weights by differences."""

import numpy as np
from keras import ops

from tests.cases import central_differences


def slopes(values, xs):
    """For each example the Jacobian of the sum over the batch of `values(xs)`, of shape `(batch, parts, elements)`."""
    blocks = []
    for place, x in enumerate(xs):
        block = np.empty((*x.shape, values(xs).shape[1]))
        for index in np.ndindex(x.shape):
            shifted = x.astype(complex)
            shifted[index] += 1e-30j
            block[index] = values([*xs[:place], shifted, *xs[place + 1 :]]).imag.sum(axis=0) / 1e-30
        blocks.append(np.moveaxis(block.reshape(len(x), -1, block.shape[-1]), 2, 1))
    return np.concatenate(blocks, axis=2)


def norm_of(g, norm):
    return {1: abs(g).sum(axis=-1), 2: np.sqrt((g**2).sum(axis=-1)), "inf": abs(g).max(axis=-1)}[norm]


def directions_of(g, norm):
    if norm == 1:
        return np.sign(g)
    if norm == 2:
        length = np.sqrt((g**2).sum(axis=-1, keepdims=True))
        return g / np.where(length > 0, length, 1)
    return np.sign(g) * (abs(g) == abs(g).max(axis=-1, keepdims=True))


class Reference:
    """The penalty of `values(weights, xs)`, of shape `(batch, parts)`, as a function of the weights.

    With a `step_size` it is that of finite differences, along the directions at the weights given first.
    """

    def __init__(self, values, weights, xs, norm=2, squared=True, center=0.0, step_size=None, sample_weight=1.0):
        self.values, self.weights, self.xs = values, weights, xs
        self.norm, self.squared, self.center, self.step_size = norm, squared, center, step_size
        self.sample_weight = sample_weight
        self.directions = directions_of(self.jacobian(weights), norm)

    def jacobian(self, weights):
        return slopes(lambda xs: self.values(weights, xs), self.xs)

    def quotients(self, weights):
        found = []
        for part in range(self.directions.shape[1]):
            shifted, start = [], 0
            for x in self.xs:
                size = int(np.prod(x.shape[1:]))
                shifted.append(x + self.step_size * self.directions[:, part, start : start + size].reshape(x.shape))
                start += size
            difference = self.values(weights, shifted) - self.values(weights, self.xs)
            found.append(difference[:, part] / self.step_size)
        return np.stack(found, axis=1)

    def __call__(self, weights):
        if self.step_size is None:
            found = norm_of(self.jacobian(weights).reshape(len(self.xs[0]), -1), self.norm)
        else:
            q = self.quotients(weights)
            found = q[:, 0] if q.shape[1] == 1 else norm_of(q, self.norm)
        distance = found - self.center
        return np.mean(self.sample_weight * (distance**2 if self.squared else abs(distance)))

    def gradient(self, eps=1e-6):
        return central_differences(self, self.weights, eps)


def numpy(x):
    return np.asarray(ops.convert_to_numpy(x)).astype("float64")


def assert_equal_to(reference, found, rtol=1e-6, value_rtol=1e-9):
    value, gradients = found
    np.testing.assert_allclose(value, reference(reference.weights), rtol=value_rtol)
    expected = reference.gradient()
    assert len(gradients) == len(expected)
    scale = max(abs(e).max() for e in expected)
    for g, e in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=rtol, atol=rtol * scale)
