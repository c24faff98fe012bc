"""Checks the argument `quantities` of a callback, the names of what it measures."""

from keras_gradtools import validation


def require_quantities(owner, quantities, known):
    """Returns the names in `quantities` as a tuple, or None for None. Raises `ValueError` for unknown names."""
    chosen = (quantities,) if isinstance(quantities, str) else quantities
    is_right = chosen is None or (isinstance(chosen, (tuple, list)) and chosen and set(chosen) <= set(known))
    if not is_right:
        raise validation.refused(owner, f"some of {', '.join(known)}", "quantities", quantities)
    return None if chosen is None else tuple(chosen)
