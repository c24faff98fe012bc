"""Compares a product with a second derivative to central differences of the gradient, where these have converged."""

from typing import NamedTuple

import numpy as np

from keras_gradtools.finite_differences import SAFETY

# For the coarsest dtype: the rounding unit; the first step, as a fraction of the size of each argument; the number of
# halvings; and the relative error that a product may have.
_PRECISIONS = {
    "float64": (2.0**-53, 2.0**-5, 12, 0.01),
    "float32": (2.0**-24, 2.0**-3, 10, 0.01),
    "float16": (2.0**-11, 2.0**-2, 3, 0.1),
    "bfloat16": (2.0**-8, 2.0**-1, 2, 0.2),
}
# The fraction of elements that must have converged to accept a product at once, and after the last step.
_SURE, _ENOUGH = 0.9, 0.5
# A product is wrong only if its error is this many times the last change of the differences.
_CLEAR = 4
# The first comparisons have the largest steps, so in this many of them the size of the rounding is not checked.
_FIRST = 2
# Over many elements, the bound on the rounding is divided by this, since few elements reach their bound.
_OF_MANY = 4
# Noise of this fraction of the gradient means that the gradient itself differs between calls.
_UNSTEADY = 0.05


class _Comparison(NamedTuple):
    """The product and the differences of one tensor at one step, compared over the elements that have converged."""

    share: float
    error: float
    change: float
    size: float
    is_close: bool
    # Whether the rounding is small compared to the allowed error, or as small as it can be.
    is_fine: bool

    def agrees(self, share):
        return self.is_close and self.is_fine and self.share >= share

    @property
    def accuses(self):
        # Differences with a rounding error also change by about that much from step to step.
        return self.share >= _ENOUGH and not self.is_close and self.error >= _CLEAR * self.change


class SlopeSearch:
    """Central differences of `gradient_at(offset)` along a direction, with repeatedly halved steps.

    `leaves`, a `finite_differences.Leaves`, splits a vector into its tensors. `dtype` is the coarsest dtype of the
    computation.
    """

    def __init__(self, gradient_at, leaves, dtype):
        self._at, self._gradient, self._leaves = gradient_at, gradient_at(0.0), leaves
        self._epsilon, self._first_step, self._halvings, self._rtol = _PRECISIONS[dtype]

    def verdict(self, v, product):
        """Returns `"yes"`, `"wrong"` or `"unclear"`, and the relative error of the worst tensor.

        An element has converged if two successive steps give the same difference. A product is right if it agrees with
        the differences of enough elements, and wrong if the differences of three steps agree far better with one
        another than with the product. Elements at a kink converge late or never, and so do not count.
        """
        noise = self._noise(v)
        if not np.linalg.norm(noise) <= SAFETY * _UNSTEADY * np.linalg.norm(self._gradient):
            return "unclear", np.inf
        pending = {leaf: [] for leaf in range(len(self._leaves.sizes))}
        last, h = None, self._first_step
        with np.errstate(all="ignore"):
            far = self._across(2 * h * v)
            for _ in range(1 + self._halvings):
                near = self._across(h * v)
                slope = (8 * near - far) / (12 * h)
                if last is not None:
                    vectors = product, slope, last, self._gradient, noise / h
                    parts = list(zip(*map(self._leaves.split, vectors), strict=True))
                    for leaf in list(pending):
                        found = self._compared(parts[leaf], len(pending[leaf]) < _FIRST)
                        pending[leaf].append(found)
                        if found.agrees(_SURE):
                            del pending[leaf]
                    if not pending:
                        return "yes", 0.0
                last, far, h = slope, near, h / 2
        return self._concluded(pending.values())

    def _across(self, offset):
        return self._at(offset) - self._at(-offset)

    def _noise(self, v):
        # At a tiny step, the second difference of a smooth function is rounding noise, amplified by sqrt(6). The
        # dtype alone would underestimate it if large terms cancel.
        h = max(32 * self._epsilon, 2.0**-20)
        second = self._at(h * v) - 2 * self._gradient + self._at(-h * v)
        noises = []
        for found, g in zip(self._leaves.split(second), self._leaves.split(self._gradient), strict=True):
            measured = np.sqrt(np.mean(np.square(found)) / 6) if found.size else 0.0
            dtypes = self._epsilon * (np.abs(g) + np.sqrt(np.mean(np.square(g)) if g.size else 0.0))
            noises.append(SAFETY * np.maximum(measured, dtypes))
        return np.concatenate([np.zeros(0), *noises])

    def _compared(self, parts, is_first):
        product, slope, last, gradient, rounding = parts
        # Elements that are zero up to rounding carry no information.
        counted = (gradient != 0) | (np.abs(slope) > rounding) | (np.abs(product) > rounding)
        change = np.abs(slope - last)
        typical = np.median(np.abs(slope[counted])) if counted.any() else 0.0
        converged = change <= self._rtol / 2 * (np.abs(slope) + typical) + rounding
        converged &= counted & np.isfinite(slope)
        share = converged.sum() / counted.sum() if counted.any() else 1.0
        error = float(np.linalg.norm(np.nan_to_num((product - slope)[converged], nan=np.inf)))
        size = float(max(np.linalg.norm(np.nan_to_num(product[converged])), np.linalg.norm(slope[converged])))
        noise = float(np.linalg.norm(rounding[converged])) / _OF_MANY
        allowed, is_fine = self._rtol * size + noise, is_first or bool(noise <= 2 * self._rtol * size)
        change = float(np.linalg.norm(change[converged]))
        return _Comparison(share, error, change, size, bool(error <= allowed), is_fine)

    def _concluded(self, tensors):
        verdict, off = "yes", 0.0
        for steps in tensors:
            if any(step.agrees(_ENOUGH) for step in steps):
                continue
            accusing = [b for a, b in zip(steps, steps[1:], strict=False) if a.accuses and b.accuses]
            if accusing:
                best = min(accusing, key=lambda s: s.change / s.error)
                verdict, off = "wrong", max(off, best.error / best.size if best.size else np.inf)
            elif verdict == "yes":
                verdict = "unclear"
        return verdict, off
