"""A line search for the strong Wolfe conditions."""

import math
from typing import Any, NamedTuple

import numpy as np

# Nocedal & Wright's constants for quasi-Newton methods: sufficient decrease, and the largest slope relative to the
# first one.
DECREASE, CURVATURE = 1e-4, 0.9
# The next step is at least this share of an interval away from both of its ends, and at most this factor longer.
_MARGIN, _MOST_GROWTH = 0.1, 10.0
# A loss below the first one plus this times its rounding unit counts as not above it.
ROUNDING = 16.0


class Point(NamedTuple):
    """The loss at a step along the direction, its slope there, and the `Trial` that has more about it."""

    step: float
    loss: float
    slope: float
    trial: Any = None

    @property
    def is_finite(self):
        return math.isfinite(self.loss) and math.isfinite(self.slope)


class LineSearchResult(NamedTuple):
    """The accepted `Point`, or None, the number of evaluations, and whether both Wolfe conditions hold."""

    point: Point | None
    evaluations: int
    is_wolfe: bool


def line_search(evaluate, start, step, max_evaluations, epsilon):
    r"""Searches for a step $t$ with $\phi(t) \le \phi(0) + c_1 t \phi'(0)$ and $|\phi'(t)| \le c_2 |\phi'(0)|$.

    Steps grow until they enclose such a step. The interval then shrinks by cubic interpolation. If rounding hides the
    decrease, Hager & Zhang's approximate conditions on the slope take the place of the first one.

    Args:
        evaluate: A function of a step that returns a `Point`.
        start: The `Point` at 0, with a negative slope.
        step: The first step.
        max_evaluations: Maximum number of evaluations. Then the best step with a sufficient decrease is taken, if any.
        epsilon: The rounding unit of the losses.

    Source: Nocedal & Wright, "Numerical Optimization" (2006), algorithms 3.5 and 3.6; Hager & Zhang, "A new conjugate
    gradient method with guaranteed descent" (2005), equation 4.1.
    """
    rounding = ROUNDING * epsilon * abs(start.loss)
    low, high = start, None
    for count in range(1, max_evaluations + 1):
        point = evaluate(step)
        if _is_accepted(start, point, rounding):
            return LineSearchResult(point, count, True)
        is_decrease = point.is_finite and point.loss <= start.loss + DECREASE * step * start.slope
        if not is_decrease or point.loss >= low.loss:
            high = point
        else:
            # A slope that leads back encloses a minimum with the former point.
            if high is None and point.slope >= 0.0 or high is not None and point.slope * (high.step - low.step) >= 0.0:
                high = low
            former, low = low, point
        step = _longer(former, low) if high is None else _between(low, high)
    return LineSearchResult(low if low.step > 0.0 else None, max_evaluations, False)


def _is_accepted(start, point, rounding):
    if not point.is_finite or abs(point.slope) > CURVATURE * abs(start.slope):
        return False
    if point.loss <= start.loss + DECREASE * point.step * start.slope:
        return True
    is_hidden = abs(point.loss - start.loss) <= rounding
    return is_hidden and point.slope <= (2.0 * DECREASE - 1.0) * start.slope


def _longer(former, point):
    """A step beyond `point`, at which the loss still goes down."""
    width = point.step - former.step
    found = _minimum(former, point)
    least, most = point.step + width, _MOST_GROWTH * point.step
    return min(max(found, least), most) if math.isfinite(found) and found > point.step else min(2.0 * least, most)


def _between(low, high):
    """A step inside the interval, away from its ends."""
    width = high.step - low.step
    found = _minimum(low, high) if high.is_finite else math.nan
    share = (found - low.step) / width if math.isfinite(found) else 0.5
    return low.step + width * min(max(share, _MARGIN), 1.0 - _MARGIN)


def _minimum(a, b):
    """The minimum of the cubic through two points with their slopes. NaN if there is none."""
    with np.errstate(all="ignore"):
        d1 = a.slope + b.slope - 3.0 * (a.loss - b.loss) / (a.step - b.step)
        inside = d1 * d1 - a.slope * b.slope
        if not inside >= 0.0:
            return math.nan
        d2 = math.copysign(math.sqrt(inside), b.step - a.step)
        divisor = b.slope - a.slope + 2.0 * d2
        return b.step - (b.step - a.step) * (b.slope + d2 - d1) / divisor if divisor else math.nan
