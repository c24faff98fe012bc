"""What several estimators and solvers share: a check of the option `matvecs`, and the import of SciPy."""

import importlib

from keras_gradtools import validation


def require_matvecs(owner, matvecs, least):
    """Returns the number of products as an int. Raises `ValueError` if it is below `least`."""
    if not validation.is_count(matvecs, least):
        advice = "A standard error needs more than one sample."
        raise validation.refused(owner, f"an integer of {least} or more", "matvecs", matvecs, advice)
    return int(matvecs)


def scipy_module(owner, name):
    """Imports a module of SciPy. Raises `ImportError` that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(f'`{owner}` needs SciPy: pip install "keras-gradtools[solvers]".') from None
