"""Random directions, by which derivatives that are summed over many axes are estimated."""

from typing import Any, Literal, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_gradtools import validation

DIRECTIONS = ("rademacher", "gaussian", "coordinates")
Distribution = Literal["rademacher", "gaussian", "coordinates"]


class Sampling(NamedTuple):
    """How many directions are drawn, from which distribution, and whether the standard error is returned."""

    samples: int
    directions: Distribution
    return_standard_error: bool

    @property
    def is_on_axes(self):
        return self.directions == "coordinates"

    def draw(self, name, count, seed, dtype):
        """Vectors of `count` entries, one in each row. The expected value of v v^T is the identity."""
        shape = (self.samples, count)
        if self.directions == "rademacher":
            return ops.cast(2 * keras.random.randint(shape, 0, 2, dtype="int32", seed=seed) - 1, dtype)
        if self.directions == "gaussian":
            return keras.random.normal(shape, dtype=dtype, seed=seed)
        if self.samples > count:
            raise ValueError(
                f"{name} with directions='coordinates' draws without replacement, and expects at most {count} "
                f"`samples`, the number of axes. Received: samples={self.samples}. Leave out `samples` for the exact "
                "value."
            )
        chosen = keras.random.shuffle(ops.arange(count, dtype="int32"), seed=seed)[: self.samples]
        return ops.one_hot(chosen, count, dtype=dtype) * ops.cast(np.sqrt(count), dtype)

    def estimate(self, values, count):
        """The mean of samples along axis 0, with its standard error if it is to be returned."""
        mean = ops.mean(values, axis=0)
        if not self.return_standard_error:
            return mean
        variance = ops.sum(ops.square(values - mean), axis=0) / (self.samples * (self.samples - 1))
        if self.is_on_axes:
            variance = variance * (1 - self.samples / count)
        # The square root has no derivative at zero, and the derivative of its square should be zero there.
        is_zero = variance <= 0
        return mean, ops.where(is_zero, ops.zeros_like(mean), ops.sqrt(ops.where(is_zero, 1.0, variance)))


def require_sampling(
    name: str, samples: Any, directions: Any, seed: Any, return_standard_error: Any
) -> Sampling | None:
    """Returns the `Sampling`, or None for the exact value. Raises `ValueError` for invalid options."""
    samples = validation.require_count(name, "samples", samples, may_be_none=True)
    validation.require_choice(name, "directions", directions, DIRECTIONS)
    validation.require_flag(name, "return_standard_error", return_standard_error)
    validation.require_seed(name, seed, may_be_none=True, may_be_generator=True)
    if samples is None:
        for option, given, default in (
            ("directions", directions, DIRECTIONS[0]),
            ("seed", seed, None),
            ("return_standard_error", return_standard_error, False),
        ):
            if given is not default and given != default:
                raise ValueError(
                    f"{name} expects `samples`, the number of random directions, with `{option}`. Received: "
                    f"{option}={given!r} and no `samples`, which computes the exact value."
                )
        return None
    if return_standard_error and samples < 2:
        raise ValueError(f"{name} expects at least 2 `samples` for a standard error. Received: samples={samples}.")
    return Sampling(samples, directions, bool(return_standard_error))
