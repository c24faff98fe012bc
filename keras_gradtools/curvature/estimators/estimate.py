"""An estimated value with its standard error."""

from typing import Any, NamedTuple

from keras_gradtools.display.results import displayed


@displayed
class Estimate(NamedTuple):
    """An estimate from random samples.

    Attributes:
        value: The estimate, a float or an array.
        standard_error: The standard error of the mean, estimated from the samples. The true value is within two
            standard errors in about 95 of 100 cases. 0 if the value was computed exactly.
    """

    value: Any
    standard_error: Any
