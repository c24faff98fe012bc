"""The slope of a function of one number, from both sides, by its values alone.

At a kink the two sides differ, and what lies between them, or between the slopes at points nearby, is a generalized
derivative (Clarke's). Where a function has a pole in its derivative (`sqrt` at 0), a side is infinite; where it jumps,
there is none.
"""

import typing

import numpy as np

_NODES = np.arange(1, 6)
# The derivative at 0 of the polynomial through the values at the nodes.
_WEIGHTS = np.linalg.solve(np.vander(_NODES.astype(float), increasing=True).T, [0, 1, 0, 0, 0])
_LIMIT = np.linalg.solve(np.vander(_NODES.astype(float), increasing=True).T, [1, 0, 0, 0, 0])
_STEPS = (1e-2, 2.5e-3)
_MORE_STEPS = (6e-2, 5e-4, 1e-4, 1e-5)


class Slope(typing.NamedTuple):
    """Between what bounds a derivative lies, for each element; NaN where its values do not tell."""

    low: np.ndarray
    high: np.ndarray
    error: np.ndarray
    # Whether a part of the function jumps: a derivative, if any, is then that of one of its branches.
    jumps: bool = False

    def weighted(self, weights):
        """The slope of the sum of all elements, each times a weight."""
        sides = np.stack([weights * self.low, weights * self.high])
        return Slope(sides.min(0).sum(), sides.max(0).sum(), np.abs(weights * self.error).sum(), self.jumps)

    @property
    def is_smooth(self):
        return bool(np.all(np.isfinite(self.low)) and np.array_equal(self.low, self.high))

    @property
    def is_infinite(self):
        return bool(np.isinf(self.low).any() or np.isinf(self.high).any())

    def with_zero(self):
        """The same, and 0: by convention, the derivative of what is not smooth."""
        return Slope(np.minimum(self.low, 0), np.maximum(self.high, 0), self.error, self.jumps)

    def judge(self, actual, rtol=1e-6):
        """ "right", "unknown", "NaN" or "wrong ..." for a derivative that was computed."""
        actual = np.asarray(actual, "float64")
        low, high, error = (np.asarray(x, "float64") for x in self[:3])
        if actual.shape != low.shape:
            return f"wrong: of shape {actual.shape}, expected {low.shape}"
        known = ~(np.isnan(low) | np.isnan(high))
        if actual.size and not known.any():
            return "unknown"
        infinite = np.isinf(low) | np.isinf(high)
        finite = np.concatenate([[0.0], np.abs(low[known & ~infinite]), np.abs(high[known & ~infinite])])
        with np.errstate(invalid="ignore"):
            tolerance = rtol * (1 + np.where(infinite, 0, np.abs(low) + np.abs(high)) + finite.max()) + 10 * error
            tolerance = np.where(infinite, 0, tolerance)
            inside = (low - tolerance <= actual) & (actual <= high + tolerance)
        nan = np.isnan(actual) & ~infinite & known
        wrong = known & ~inside & ~np.isnan(actual)
        if wrong.any():
            i = np.flatnonzero(wrong.ravel())[0]
            bounds = f"{low.flat[i]:.6g}" + ("" if low.flat[i] == high.flat[i] else f" to {high.flat[i]:.6g}")
            return f"wrong: {actual.flat[i]:.6g}, expected {bounds} (error {error.flat[i]:.1g})"
        return "NaN" if nan.any() else "right"


def slope(fun, may_be_kink=True):
    """The `Slope` at 0 of a function of one number that returns an array; NaN where the function jumps at 0."""
    if not may_be_kink:
        fine, coarse = (_both_sides(fun, h) for h in (2.5e-3, 5e-3))
        if np.all(np.abs(fine - coarse) <= 1e-7 * (1 + np.abs(fine))):
            return Slope(fine, fine, np.abs(fine - coarse))
    value = np.asarray(fun(0.0), "float64")
    sides = [_side(fun, sign, value) for sign in (1, -1)]
    values, errors = np.stack([side[0] for side in sides]), np.stack([side[1] for side in sides])
    jumps = np.any([side[2] for side in sides], axis=0)
    # Outside of the domain there is no side.
    values = np.where(np.isnan(values), values[::-1], values)
    errors = np.where(np.isnan(errors), errors[::-1], errors)
    low, high, error = values.min(0), values.max(0), errors.max(0)
    with np.errstate(invalid="ignore"):
        same = np.abs(high - low) <= 1e-5 * (1 + np.abs(high)) + error
    low, high = np.where(same, values[0], low), np.where(same, values[0], high)
    unclear = (error > 1e-2 * (1 + np.abs(low) + np.abs(high))) | jumps
    return Slope(np.where(unclear, np.nan, low), np.where(unclear, np.nan, high), error, bool(jumps.any()))


def _both_sides(fun, h):
    """By the central difference of fourth order, in fewer values."""
    values = [np.asarray(fun(h * node), "float64") for node in (-2, -1, 1, 2)]
    return (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h)


def sampled(slopes):
    """What lies between the slopes at points nearby, where a function is smooth."""
    slopes = np.stack([x for x in slopes if np.isfinite(x).all()] or [np.full_like(slopes[0], np.nan)])
    low, high = slopes.min(0), slopes.max(0)
    return Slope(low, high, 1e-3 * (high - low) + 2e-3 * (np.abs(low) + np.abs(high)))


def central(fun, h=1e-5):
    """The slope at 0 of a smooth function."""
    return (np.asarray(fun(h), "float64") - np.asarray(fun(-h), "float64")) / (2 * h)


def _side(fun, sign, value):
    """The slope at one side with its error, and whether there is a jump on the way there.

    It is infinite where it grows without end, NaN where there is none.
    """
    at = {h: [np.asarray(fun(sign * h * node), "float64") for node in _NODES] for h in _STEPS}
    limit = sum(w * x for w, x in zip(_LIMIT, at[_STEPS[-1]], strict=True))
    with np.errstate(invalid="ignore"):
        jumps = np.abs(limit - value) > 0.05 * (1 + np.abs(value))
    estimates = [_estimate(at[h], sign * h) for h in _STEPS]
    best, error = estimates[1], np.abs(estimates[1] - estimates[0])
    if np.all(error <= 1e-7 * (1 + np.abs(best))):
        return best, error, jumps
    steps = np.array([*_STEPS, *_MORE_STEPS])
    estimates += [_estimate([fun(sign * h * node) for node in _NODES], sign * h) for h in _MORE_STEPS]
    order = np.argsort(-steps)
    estimates = np.stack(estimates)[order]
    gaps = np.abs(np.diff(estimates, axis=0))
    gaps = np.where(np.isnan(gaps), np.inf, gaps)
    i = gaps.argmin(0)[None]
    best, error = np.take_along_axis(estimates, i + 1, 0)[0], np.take_along_axis(gaps, i, 0)[0]
    with np.errstate(invalid="ignore", divide="ignore"):
        growth = np.abs(estimates[-3:]) / np.abs(estimates[-4:-1])
        diverges = np.all(growth > 1.3, axis=0) & (np.abs(estimates[-1]) > 10)
    best = np.where(diverges, np.sign(estimates[-1]) * np.inf, np.where(np.isinf(error), np.nan, best))
    # A function with an infinite slope is far off its limit at any step.
    return best, np.where(diverges, 0.0, np.where(np.isinf(error), np.nan, error)), jumps & ~diverges


def _estimate(values, h):
    with np.errstate(invalid="ignore"):
        return sum(w * np.asarray(x, "float64") for w, x in zip(_WEIGHTS, values, strict=True)) / h
