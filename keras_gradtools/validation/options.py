"""Checks of options: flags, numbers, choices. Each returns the checked value."""

import math

import keras
import numpy as np

from keras_gradtools.validation.descriptions import shown
from keras_gradtools.validation.kinds import is_count, is_number, is_one_of

_OR_NONE = ", or None,"


def require_flag(owner, name, x):
    """Returns `x` as a bool. Raises `ValueError` for anything else."""
    if not isinstance(x, (bool, np.bool_)):
        raise refused(owner, "True or False", name, x)
    return bool(x)


def require_count(owner, name, x, least=1, may_be_none=False):
    """Returns `x` as an int. Raises `ValueError` unless it is an integer of at least `least`, or an allowed None."""
    if x is None and may_be_none:
        return None
    if not is_count(x, least):
        what = "a positive integer" if least == 1 else f"an integer of {least} or more"
        raise refused(owner, what + _OR_NONE * may_be_none, name, x)
    return int(x)


def require_seed(owner, seed, may_be_none=False, may_be_generator=False):
    """Returns `seed`. Raises `ValueError` unless it is an integer of 0 or more, or an allowed None or generator."""
    if may_be_none and seed is None or may_be_generator and isinstance(seed, keras.random.SeedGenerator):
        return seed
    if not is_count(seed, 0):
        others = ", a keras.random.SeedGenerator" * may_be_generator + _OR_NONE * may_be_none
        raise refused(owner, f"an integer of 0 or more{others}", "seed", seed)
    return int(seed)


def require_number(owner, name, x, least=-math.inf, above=-math.inf, below=math.inf, may_be_none=False, advice=""):
    """Returns `x` as a float. Raises `ValueError` unless it is a finite number within the bounds, or an allowed None.

    It is at least `least`, greater than `above`, and less than `below`. `advice` ends the message.
    """
    if x is None and may_be_none:
        return None
    if not is_number(x) or not (least <= x and above < x < below):
        raise refused(owner, _range(least, above, below) + _OR_NONE * may_be_none, name, x, advice)
    return float(x)


def _range(least, above, below):
    if below < math.inf:
        return f"a number between {max(least, above):g} and {below:g}"
    if least > -math.inf:
        return f"a number of {least:g} or more"
    return "a positive number" if above == 0 else f"a number above {above:g}" if above > 0 else "a finite number"


def require_choice(owner, name, x, choices, advice=""):
    """Returns `x`. Raises `ValueError` unless it is one of `choices`. `advice` ends the message."""
    if not is_one_of(x, choices):
        *others, last = map(repr, choices)
        raise refused(owner, f"{', '.join(others)} or {last}", name, x, advice)
    return x


def require_verbose(owner, verbose):
    """Returns `verbose`. Raises `ValueError` unless it is "auto", 0 or 1."""
    return require_choice(owner, "verbose", verbose, ("auto", 0, 1))


def refused(owner, expected, name, received, advice=""):
    """The `ValueError` for the argument `name`. It says what was expected and received, and what to do."""
    given = f"Received: {name}={shown(received)}."
    return ValueError(f"{owner} expects {expected} as `{name}`. {given}" + (f" {advice}" if advice else ""))
