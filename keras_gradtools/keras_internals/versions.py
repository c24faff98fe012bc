"""Which versions of Keras were tested, and the words about all others."""

import re
import warnings

import keras

# The oldest and the newest row of `make test-versions`, as (major, minor). Of 3.16 it was the nightly.
OLDEST, NEWEST = (3, 10), (3, 16)


def describe():
    """What was tested and what is installed, in one sentence."""
    oldest, newest = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
    return f"keras_gradtools was tested with Keras {oldest} to {newest}. Received: Keras {keras.__version__}."


def advice():
    """What to do under a Keras that does not fit."""
    major, minor = NEWEST
    return (
        "Install a newer keras_gradtools that knows this Keras, or a Keras that was tested, with "
        f'`pip install "keras>={OLDEST[0]}.{OLDEST[1]},<{major}.{minor + 1}"`.'
    )


def is_tested():
    """Whether the installed Keras is one of those that were tested, by its major and minor number."""
    numbers = re.match(r"(\d+)\.(\d+)", keras.__version__)
    return numbers is not None and OLDEST <= tuple(map(int, numbers.groups())) <= NEWEST


def warn_if_untested():
    """Warns of a Keras that was not tested, though everything that is needed of it was found."""
    if not is_tested():
        warnings.warn(
            f"{describe()} All internals that are needed were found in it, so that it may work as it is. {advice()}",
            stacklevel=2,
        )


def missing(what):
    """The error for an internal that this Keras does not have."""
    return RuntimeError(f"{describe()} This Keras has no {what}, which is needed. {advice()}")


def without_effect(what, where):
    """The error for a replaced function that this Keras does not call where it should."""
    return RuntimeError(
        f"{describe()} This Keras does not use {what} in {where}, so that gradients could be wrong without a word. "
        f"{advice()}"
    )
