"""The loss over a plane through the weights."""

from typing import Any, NamedTuple

import numpy as np

from keras_gradtools import validation
from keras_gradtools.annotations import ArrayLike
from keras_gradtools.curvature.estimators.eigenvalues import eigsh
from keras_gradtools.curvature.operators.matrix_arguments import progress_of
from keras_gradtools.display.results import displayed


@displayed
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


def loss_surface(
    operator: Any, directions: ArrayLike = None, distance: float = 1.0, points: int = 21, seed: int = 0
) -> LossSurface:
    r"""The loss $L(\theta + a \, u_1 + b \, u_2)$ over a plane through the weights.

    Args:
        operator: A curvature operator.
        directions: A NumPy array of shape `(n, 2)` with the directions in its columns, which are scaled to length 1.
            Default: the eigenvectors of the two largest eigenvalues.
        distance: $a$ and $b$ range from `-distance` to `distance`, in the units of the weights.
        points: Number of values of $a$ and of $b$, 2 or more. An odd number includes 0.
        seed: An integer that seeds `eigsh`.

    Returns:
        A `LossSurface`, which `kg.plots.plot_loss_surface` draws. The weights do not change.

    Raises:
        ValueError: If the operator has no loss, or an option is invalid.

    Cost:
        `points**2` evaluations of the loss over the data, two products, and those of `eigsh`.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    >>> model.set_weights([np.zeros((2, 1), "float32")])
    >>> x, y = np.array([[2.0, 0.0], [0.0, 1.0]], "float32"), np.zeros((2, 1), "float32")
    >>> hessian = kg.curvature.Hessian(model, "mse", (x, y))  # the loss is (4 a^2 + b^2) / 2
    >>> kg.curvature.loss_surface(hessian, np.eye(2, dtype="float32"), points=3).loss
    array([[2.5, 2. , 2.5],
           [0.5, 0. , 0.5],
           [2.5, 2. , 2.5]])

    Source: Yao, Gholami, Keutzer & Mahoney, "PyHessian" (arXiv:1912.07145, 2019), figure 1.
    """
    if not hasattr(operator, "loss_and_gradient"):
        raise ValueError(
            "loss_surface expects a curvature operator, which has a loss. Received: operator="
            f"{validation.describe(operator)}."
        )
    validation.require_number("loss_surface", "distance", distance, above=0)
    validation.require_count("loss_surface", "points", points, 2)
    validation.require_seed("loss_surface", seed)
    if directions is None:
        directions = eigsh(operator, 2, seed=seed)[1][:, ::-1]
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
    with progress_of(operator, "loss_surface", points**2, "loss") as bar:
        for i, a in enumerate(line):
            for j, b in enumerate(line):
                losses[i, j] = bar.after(operator.loss(directions @ np.array([a, b], directions.dtype)))
    return LossSurface(line, line.copy(), losses, curvatures)
