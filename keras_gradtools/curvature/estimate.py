"""A number that was estimated, and how far off it may be."""

from typing import Any, NamedTuple


class Estimate(NamedTuple):
    """An estimate from random samples.

    Attributes:
        value: the estimate, a float or an array.
        standard_error: the standard deviation of the mean, estimated from the samples: the truth lies within twice
            of it in about 95 of 100 cases. 0 where the value was not sampled but computed.
    """

    value: Any
    standard_error: Any
