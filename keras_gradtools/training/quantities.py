"""Which of its quantities a callback measures."""

from keras_gradtools import validation


def checked_quantities(owner, quantities, known):
    """The names in the argument `quantities` as a tuple, or None for None. Raises `ValueError` for unknown names."""
    chosen = (quantities,) if isinstance(quantities, str) else quantities
    is_right = chosen is None or (isinstance(chosen, (tuple, list)) and chosen and set(chosen) <= set(known))
    if not is_right:
        raise ValueError(
            f"{owner} expects some of {', '.join(known)} as `quantities`. "
            f"Received: quantities={validation.shown(quantities)}."
        )
    return None if chosen is None else tuple(chosen)
