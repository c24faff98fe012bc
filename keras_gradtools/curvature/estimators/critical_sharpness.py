"""The sharpness along one direction, from evaluations of the loss alone."""

import math
from typing import Any, NamedTuple

import numpy as np

from keras_gradtools import validation
from keras_gradtools.annotations import ArrayLike
from keras_gradtools.display.results import displayed

NAME = "critical_sharpness"
# Steps between these exponents of 2, relative to the first one, are tried before the result is 0 or infinity.
_MOST_DOUBLINGS = 40


@displayed
class CriticalSharpness(NamedTuple):
    """The critical sharpness along a direction.

    Attributes:
        value: The critical sharpness, 2 / `step`. 0 if no step raised the loss. NaN if no step lowered it, as at a
            minimum up to rounding, or if the direction is zero or the loss is not finite.
        step: The critical step, the smallest at which the loss exceeds its value at the weights.
        evaluations: Number of evaluations of the loss.
    """

    value: float
    step: float
    evaluations: int


def critical_sharpness(
    operator: Any, direction: ArrayLike = None, start: float | None = None, tol: float = 0.125
) -> CriticalSharpness:
    r"""The critical sharpness $\lambda_c = 2 / \eta_c$ along a direction of descent $d$.

    $\eta_c$ is the smallest step with $L(\theta - \eta_c d) > L(\theta)$. For a quadratic loss with the Hessian $H$ and
    the gradient $g$, $\lambda_c = d^\top H d \,/\, g^\top d$. With the gradient as the direction, this is a mean of the
    eigenvalues of $H$, weighted by the squared components of the gradient, and at most the largest eigenvalue. A step
    of gradient descent with a learning rate above $\eta_c = 2 / \lambda_c$ would raise the loss. Steps are doubled or
    halved until they enclose $\eta_c$, then bisected.

    Args:
        operator: A curvature operator. Only its loss is used.
        direction: A vector of shape `(n,)` for n weights, such as the last update of an optimizer divided by minus the
            learning rate. Default: the gradient.
        start: The first step to try, such as `step` of an earlier result. Default: 2 divided by the norm of the
            direction.
        tol: Relative tolerance for the step, above 0 and below 1.

    Returns:
        A `CriticalSharpness`. The weights do not change.

    Raises:
        ValueError: If the operator has no loss, or an option is invalid.

    Cost:
        Fewer than ten evaluations of the loss over the data if `start` is within a factor of four of the result, and
        one more for each further factor of two. One gradient more if no direction is given.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    >>> x, y = np.array([[2.0, 0.0], [0.0, 1.0]], "float32"), np.zeros((2, 1), "float32")
    >>> hessian = kg.curvature.Hessian(model, "mse", (x, y))  # diagonal, with the entries 4 and 1
    >>> model.set_weights([np.array([[1.0], [0.0]], "float32")])
    >>> found = kg.curvature.critical_sharpness(hessian, tol=1e-3)  # the gradient is (4, 0)
    >>> round(found.value, 2)
    4.0

    Source: Kalra et al., "A scalable measure of loss landscape curvature for analyzing the training dynamics of LLMs"
    (arXiv:2601.16979, 2026).
    """
    if not hasattr(operator, "loss_and_gradient"):
        raise ValueError(
            f"{NAME} expects a curvature operator, which has a loss. Received: operator="
            f"{validation.describe(operator)}."
        )
    validation.require_number(NAME, "start", start, above=0, may_be_none=True)
    tol = validation.require_number(NAME, "tol", tol, above=0, below=1)
    if direction is None:
        loss, vector = operator.loss_and_gradient()
    else:
        loss, vector = operator.loss(), _direction(operator, direction)
    return along(operator, loss, vector, start, tol)


def along(operator, loss, vector, start=None, tol=0.125):
    """The `CriticalSharpness` along a NumPy vector, given the loss at the weights."""
    length = float(np.linalg.norm(vector.astype("float64")))
    if not length or not math.isfinite(length) or not math.isfinite(loss):
        return CriticalSharpness(math.nan, math.nan, 1)
    search = _Search(lambda step: operator.loss((-step * vector).astype(vector.dtype)), loss)
    step = search.critical_step(2.0 / length if start is None else start, tol)
    return CriticalSharpness(2.0 / step, step, search.evaluations)


class _Search:
    """The first step at which a loss is above the one at 0."""

    def __init__(self, loss_at, loss):
        self._loss_at, self._loss = loss_at, loss
        self.evaluations = 1

    def critical_step(self, step, tol):
        """The step, infinity if the loss is above at no step, or NaN if it is below at none."""
        change = self._change(step)
        if change <= 0.0:
            for _ in range(_MOST_DOUBLINGS):
                below, step = step, 2.0 * step
                if not self._change(step) <= 0.0:
                    return self._bisected(below, step, tol)
            return math.inf
        for _ in range(_MOST_DOUBLINGS):
            above, step = step, 0.5 * step
            # An equal loss is no descent: a step that is short enough changes nothing but the rounding.
            if self._change(step) < 0.0:
                return self._bisected(step, above, tol)
        return math.nan

    def _bisected(self, below, above, tol):
        while above > (1.0 + tol) * below:
            middle = math.sqrt(below * above)
            if self._change(middle) <= 0.0:
                below = middle
            else:
                above = middle
        return math.sqrt(below * above)

    def _change(self, step):
        """The change of the loss. Infinity for NaN, from a step that is far too long."""
        self.evaluations += 1
        change = self._loss_at(step) - self._loss
        return math.inf if math.isnan(change) else change


def _direction(operator, direction):
    vector = validation.as_array(direction, f"{NAME} expects `direction` of shape ({operator.shape[0]},)")
    if vector.shape != (operator.shape[0],):
        raise ValueError(
            f"{NAME} expects `direction` of shape ({operator.shape[0]},). Received: {validation.describe(direction)}."
        )
    return vector
