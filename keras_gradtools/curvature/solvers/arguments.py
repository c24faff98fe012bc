"""A check of the option `matvecs`, which several estimators share."""

from keras_gradtools import validation


def require_matvecs(owner, matvecs, least):
    """Returns the number of products as an int. Raises `ValueError` if it is below `least`."""
    if not validation.is_count(matvecs, least):
        advice = "A standard error needs more than one sample."
        raise validation.refused(owner, f"an integer of {least} or more", "matvecs", matvecs, advice)
    return int(matvecs)
