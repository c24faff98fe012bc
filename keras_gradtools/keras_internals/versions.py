"""The versions of Keras that were tested, and the warning and errors for all others."""

import re
import warnings

import keras

# The oldest and the newest row of `make test-versions`, as (major, minor). Keras 3.16 was tested as a nightly build.
OLDEST, NEWEST = (3, 10), (3, 16)


def describe():
    """Which versions were tested and which one is installed, for messages."""
    oldest, newest = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
    return f"keras_gradtools was tested with Keras {oldest} to {newest}. Received: Keras {keras.__version__}."


def advice():
    """What to do with an unsupported Keras, for messages."""
    major, minor = NEWEST
    return (
        "Install a newer keras_gradtools that supports this Keras, or install a tested Keras with "
        f'`pip install "keras>={OLDEST[0]}.{OLDEST[1]},<{major}.{minor + 1}"`.'
    )


def is_tested():
    """Whether the installed Keras was tested, by its major and minor version number."""
    numbers = re.match(r"(\d+)\.(\d+)", keras.__version__)
    return numbers is not None and OLDEST <= tuple(map(int, numbers.groups())) <= NEWEST


def warn_if_untested():
    """Warns if the installed Keras was not tested."""
    if not is_tested():
        warnings.warn(
            f"{describe()} It has all the private names that keras_gradtools needs, so it may work. {advice()}",
            stacklevel=2,
        )


def missing(what):
    """The error for a private name that this Keras does not have."""
    return RuntimeError(f"{describe()} This Keras has no {what}, which is needed. {advice()}")


def without_effect(what, where):
    """The error for a replaced function that this Keras does not call where it should."""
    return RuntimeError(
        f"{describe()} This Keras does not use {what} in {where}, so gradients could be silently wrong. {advice()}"
    )
