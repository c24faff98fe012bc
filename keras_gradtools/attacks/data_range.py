"""The range of the data, to which perturbed examples are clipped."""

import numpy as np
from keras import ops

from keras_gradtools import validation


def require_clip(owner, clip):
    """Returns `clip` as a pair of numbers or nested lists, or None. Raises `ValueError` for anything else."""
    if clip is None:
        return None
    try:
        low, high = (np.asarray(bound, "float64") for bound in clip)
        is_range = bool(np.all(low < high))
    except Exception:  # each framework raises its own error for a tensor without values
        is_range = False
    if not is_range:
        advice = "It is a pair of a smallest and a largest value (or of arrays of them), or None for no range."
        raise validation.refused(owner, "the range of the data", "clip", clip, advice)
    return low.tolist(), high.tolist()


def extent(clip, x, norm):
    """The smallest `epsilon` such that a ball around any point of the range contains the whole range."""
    sides = np.broadcast_to(np.subtract(clip[1], clip[0]), x.shape[1:])
    return float(np.max(sides) if norm == "inf" else np.linalg.norm(sides))


def bounds(clip, dtype):
    """The smallest and the largest value as tensors, infinite if `clip` is None."""
    low, high = (-np.inf, np.inf) if clip is None else clip
    return ops.convert_to_tensor(low, dtype=dtype), ops.convert_to_tensor(high, dtype=dtype)
