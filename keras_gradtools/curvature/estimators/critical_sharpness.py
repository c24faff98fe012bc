"""The sharpness along one direction, from evaluations of the loss alone."""

import math
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_gradtools import validation
from keras_gradtools.annotations import ArrayLike
from keras_gradtools.curvature.estimators.krylov_basis import tensor_norm
from keras_gradtools.display.results import displayed

NAME = "critical_sharpness"
# Steps between these exponents of 2, relative to the first one, are tried before the result is 0 or infinity.
_MOST_DOUBLINGS = 40
# They reach the precision of any number.
_MOST_BISECTIONS = 64
# Evaluations in one program. From a start within a factor of two of the result, the default tolerance takes five.
_AT_ONCE = 5


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
        one more for each further factor of two. One gradient more if no direction is given. For a model of at most 32
        variables and 16 layers and data in one batch, a program holds five evaluations, and the first one the gradient.

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
    return along(operator, None if direction is None else _direction(operator, direction), start, tol)[0]


def along(operator, vector=None, start=None, tol=0.125):
    """The `CriticalSharpness` along a NumPy vector or the gradient, and the norm of this direction."""
    if operator.can_evaluate_at_once():
        return _in_programs(operator, vector, start, tol)
    loss, vector = operator.loss_and_gradient() if vector is None else (operator.loss(), vector)
    length = float(np.linalg.norm(vector.astype("float64")))
    if not length or not math.isfinite(length) or not math.isfinite(loss):
        return _result(None), length
    search = _Search(2.0 / length if start is None else start)
    while not search.is_over(tol, _chosen):
        search = search.after(operator.loss((-search.step * vector).astype(vector.dtype)), loss, _chosen)
    return _result(search), length


class _Search(NamedTuple):
    """The search for the first step at which a loss is above the one at 0. Floats, or tensors in a compiled loop.

    Attributes:
        step: The step to try next.
        below: The longest step whose loss is not above. 0 if there is none.
        above: The shortest step whose loss is above. Infinity if there is none.
        evaluations: Number of evaluations of the loss, with that at 0.
    """

    step: Any
    below: Any = 0.0
    above: Any = math.inf
    evaluations: Any = 1

    def after(self, loss, initial, where):
        """The search after the loss at `step`. NaN, from a step that is far too long, is above."""
        step, below, above, evaluations = self
        # An equal loss is no descent: a step that is short enough changes nothing but the rounding.
        is_halved = (below == 0.0) & (above < math.inf)
        is_below = where(is_halved, loss < initial, loss <= initial)
        below, above = where(is_below, step, below), where(is_below, above, step)
        middle = below**0.5 * above**0.5
        step = where(below == 0.0, 0.5 * above, where(above == math.inf, 2.0 * below, middle))
        return _Search(step, below, above, evaluations + 1)

    def is_over(self, tol, where):
        """Whether the steps are close, or too many have been tried."""
        _, below, above, evaluations = self
        is_enclosed = (below > 0.0) & (above < math.inf)
        is_found = (above <= (1.0 + tol) * below) | (evaluations > _MOST_DOUBLINGS + _MOST_BISECTIONS)
        return where(is_enclosed, is_found, evaluations > _MOST_DOUBLINGS + 1)


def _chosen(condition, a, b):
    return a if condition else b


def _in_programs(operator, vector, start, tol):
    """As `along`, by programs that evaluate the loss several times."""
    given = np.array([math.nan if start is None else start, tol], operator.dtype)
    loss = state = None
    while True:
        what = (NAME, vector is None, state is None)
        vector, loss, found = operator.compute_with_loss(what, _evaluations, vector, loss, given, state)
        found = ops.convert_to_numpy(found)
        (length, is_running), state = found[:2].tolist(), found[2:]
        if not is_running:
            step, below, above, evaluations = state.tolist()
            search = _Search(step, below, above, int(evaluations))
            return _result(search if search.evaluations > 1 else None), length


def _evaluations(loss_at, loss_and_gradient, vector, loss, given, state):
    """The direction, the loss, and as one tensor: the norm, whether the search goes on, and the `_Search` now."""
    if vector is None:
        loss, vector = loss_and_gradient()
    else:
        vector = ops.convert_to_tensor(vector)
        loss = loss_at(ops.zeros_like(vector)) if loss is None else loss
    start, tol = ops.unstack(ops.convert_to_tensor(given))
    length = tensor_norm(vector)
    if state is None:
        step = ops.where(ops.isnan(start), 2.0 / length, start)
        search = _Search(step, ops.zeros_like(step), ops.full_like(step, math.inf), ops.ones_like(step))
    else:
        search = _Search(*ops.unstack(ops.convert_to_tensor(state)))
    is_possible = (length > 0.0) & ops.isfinite(length) & ops.isfinite(loss)
    for _ in range(_AT_ONCE):
        is_running = is_possible & ops.logical_not(search.is_over(tol, ops.where))
        after = search.after(loss_at(-search.step * vector), loss, ops.where)
        search = _Search(*(ops.where(is_running, new, old) for new, old in zip(after, search, strict=True)))
    is_running = is_possible & ops.logical_not(search.is_over(tol, ops.where))
    return [vector, loss, ops.stack([length, ops.cast(is_running, length.dtype), *search])]


def _result(search):
    if search is None:
        return CriticalSharpness(math.nan, math.nan, 1)
    step = math.nan if not search.below else math.sqrt(search.below) * math.sqrt(search.above)
    return CriticalSharpness(2.0 / step, step, search.evaluations)


def _direction(operator, direction):
    vector = validation.as_array(direction, f"{NAME} expects `direction` of shape ({operator.shape[0]},)")
    if vector.shape != (operator.shape[0],):
        raise ValueError(
            f"{NAME} expects `direction` of shape ({operator.shape[0]},). Received: {validation.describe(direction)}."
        )
    return vector
