"""The loss over a plane through the weights."""

from typing import Any, NamedTuple

import numpy as np

from keras_gradtools import validation


class LossSurface(NamedTuple):
    """Losses on a grid around the weights of a model.

    Attributes:
        first: Distances along the first direction, of shape `(points,)`.
        second: Distances along the second direction, of shape `(points,)`.
        loss: Losses of shape `(points, points)`, with `loss[i, j]` at `first[i]` and `second[j]`.
        curvatures: The curvature `u' A u` of the operator A along each direction u, at the weights, of shape `(2,)`.
    """

    first: Any
    second: Any
    loss: Any
    curvatures: Any


def loss_surface(operator, directions, distance, points, seed, progress):
    """The loss over a plane: see `CurvatureOperator.loss_surface`."""
    if not validation.is_number(distance) or not 0 < distance < np.inf:
        raise ValueError(
            f"loss_surface expects a positive number as `distance`. Received: distance={validation.shown(distance)}."
        )
    if not validation.is_count(points, 2):
        raise ValueError(
            f"loss_surface expects an integer from 2 on as `points`. Received: points={validation.shown(points)}."
        )
    validation.require_seed("loss_surface", seed)
    if directions is None:
        directions = operator.eigsh(2, seed=seed)[1][:, ::-1]
    directions = validation.as_array(directions, f"loss_surface expects `directions` of shape ({operator.shape[0]}, 2)")
    if directions.shape != (operator.shape[0], 2):
        raise ValueError(
            f"loss_surface expects `directions` of shape ({operator.shape[0]}, 2). Received: "
            f"{validation.describe(directions)}."
        )
    lengths = np.linalg.norm(directions.astype("float64"), axis=0)
    if not np.all(lengths > 0):
        raise ValueError(
            f"loss_surface expects `directions` of finite length, none of them zero. Received: the lengths {lengths}."
        )
    directions = (directions / lengths).astype(directions.dtype)
    curvatures = np.sum(directions * (operator @ directions), axis=0, dtype="float64")
    line = np.linspace(-distance, distance, points)
    losses = np.empty((points, points))
    with progress(points**2) as bar:
        for i, a in enumerate(line):
            for j, b in enumerate(line):
                losses[i, j] = bar.after(operator.loss(directions @ np.array([a, b], directions.dtype)))
    return LossSurface(line, line.copy(), losses, curvatures)
