"""Checks of the options that several estimators and solvers have."""

import importlib

import numpy as np

from keras_gradtools import validation


def require_non_negative(owner, name, x):
    """Raises `ValueError` unless `x` is a finite number of 0 or more."""
    if not validation.is_number(x) or not 0 <= x < np.inf:
        raise ValueError(f"{owner} expects a number of 0 or more as `{name}`. Received: {name}={validation.shown(x)}.")


def checked_matvecs(owner, matvecs, least):
    """Returns the number of products as an int. Raises `ValueError` if it is below `least`."""
    if not validation.is_count(matvecs, least):
        raise ValueError(
            f"{owner} expects at least {least} as `matvecs`, the number of products, since a standard error needs more "
            f"than one sample. Received: matvecs={validation.shown(matvecs)}."
        )
    return int(matvecs)


def scipy_module(owner, name):
    """Imports a module of SciPy. Raises `ImportError` that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(f'`{owner}` needs SciPy: pip install "keras-gradtools[solvers]".') from None
