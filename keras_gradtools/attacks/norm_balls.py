"""Norm balls of perturbations: norms, steepest directions, projections and random points.

`epsilon` has the shape `(batch,)`. Perturbations have the shape of the examples, `(batch, ...)`.
"""

import math

import keras
from keras import ops

from keras_gradtools import validation
from keras_gradtools.example_norms import at_least_single, flattened, for_each, norms


def require_norm(owner, norm):
    """Returns `norm` as 2 or "inf". Raises `ValueError` for anything else."""
    if validation.is_one_of(norm, ("inf", math.inf)):
        return "inf"
    if validation.is_one_of(norm, (2,)):
        return 2
    raise validation.refused(owner, "2 or 'inf'", "norm", norm, "It is the norm of the perturbation.")


def lengths(perturbations, norm):
    """The norm of each perturbation, of shape `(batch,)`, in float32 or float64."""
    return norms(flattened([perturbations]), norm)


def dual_lengths(gradients, norm):
    """The dual norm of each gradient: the largest slope along a perturbation of norm 1."""
    return norms(flattened([gradients]), 2 if norm == 2 else 1)


def steepest(gradients, norm):
    """The steepest ascent direction of norm 1 for each gradient, zero where the gradient is zero."""
    if norm == "inf":
        return ops.sign(gradients)
    gradients = at_least_single(gradients)
    return gradients / for_each(ops.maximum(lengths(gradients, 2), 1e-37), gradients)


def projected(perturbations, epsilon, norm):
    """The perturbations, projected onto the ball of radius `epsilon`."""
    if norm == "inf":
        bound = for_each(ops.cast(epsilon, perturbations.dtype), perturbations)
        return ops.clip(perturbations, -bound, bound)
    length = ops.maximum(lengths(perturbations, 2), 1e-37)
    share = ops.minimum(ops.cast(epsilon, length.dtype) / length, 1.0)
    return ops.cast(at_least_single(perturbations) * for_each(share, perturbations), perturbations.dtype)


def random_points(like, epsilon, norm, seed):
    """Perturbations drawn uniformly from the ball of radius `epsilon`."""
    shape, dtype = ops.shape(like), like.dtype
    scale = for_each(ops.cast(epsilon, dtype), like)
    if norm == "inf":
        return scale * ops.cast(keras.random.uniform(shape, -1.0, 1.0, seed=seed), dtype)
    # One draw for direction and length, because two draws with the same integer seed would be correlated.
    size = math.prod(like.shape[1:])
    drawn = keras.random.normal((shape[0], size + 2), seed=seed)
    # The first n coordinates of a uniform point on the unit sphere in n + 2 dimensions are uniform in the n-ball.
    inside = drawn[:, :size] / for_each(lengths(drawn, 2), drawn)
    return scale * ops.cast(ops.reshape(inside, shape), dtype)
