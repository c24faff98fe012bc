"""The networks, and the models of their residuals, whose outputs `fit` trains towards zero."""

import keras
import numpy as np
from keras import layers, ops

import keras_gradtools as kg

UNITS = (20, 20, 20)


class Solution(keras.Model):
    """u at the points: a network with tanh inside the ansatz of the problem."""

    def __init__(self, problem, **kwargs):
        super().__init__(**kwargs)
        self.problem = (problem,)
        self.hidden = [layers.Dense(units, "tanh") for units in UNITS]
        self.last = layers.Dense(1)

    def call(self, points):
        (problem,) = self.problem
        h = problem.features(ops, points)
        for layer in (*self.hidden, self.last):
            h = layer(h)
        return problem.ansatz(ops, points, h)


class Residual(keras.Model):
    """The residual of the equation at the points."""

    def __init__(self, problem, **kwargs):
        super().__init__(**kwargs)
        self.problem = (problem,)
        self.solution = Solution(problem)

    def call(self, points):
        (problem,) = self.problem
        if problem.derivatives is None:
            inside = points[:, : problem.inputs]
            found = {"u": self.solution(inside), "laplacian": kg.laplacian(self.solution)(inside)}
        else:
            derivatives = kg.partial_derivatives(self.solution, problem.derivatives, problem.variables)
            found = derivatives(points)
        return problem.equation(ops, points, found)


def build(problem, seed):
    """The residual model, with the same weights on every backend, and its points."""
    rng = np.random.default_rng(seed)
    points = problem.sample(rng)
    model = Residual(problem)
    model(ops.convert_to_tensor(points[:2]))
    for v in model.trainable_variables:
        fan = sum(v.shape) if len(v.shape) == 2 else 1
        v.assign(rng.normal(size=v.shape) * np.sqrt(2.0 / fan) if len(v.shape) == 2 else np.zeros(v.shape))
    return model, points


class Error:
    """The relative L2 error of the solution, from flat or separate weights, in NumPy."""

    def __init__(self, problem):
        self._problem = problem
        self._points, self._exact = problem.exact()
        self._features = problem.features(np, self._points)

    def __call__(self, weights):
        h = self._features
        for kernel, bias in zip(weights[::2], weights[1::2], strict=True):
            h = np.tanh(h @ kernel + bias) if kernel.shape[1] > 1 else h @ kernel + bias
        found = self._problem.ansatz(np, self._points, h)
        return float(np.linalg.norm(found - self._exact) / np.linalg.norm(self._exact))
