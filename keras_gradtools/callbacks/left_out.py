"""What a callback cannot measure of a model: it is left out with one warning, and the training goes on."""

import warnings


class LeftOut:
    """The quantities that were given up."""

    def __init__(self, owner):
        self._owner = owner
        self._given_up: set[str] = set()

    def tried(self, quantity, compute):
        """What `compute()` returns; None where it raises, for the first time with a warning, and never tried again."""
        if quantity in self._given_up:
            return None
        try:
            return compute()
        except Exception as error:  # a training must not end by what only watches it
            self._given_up.add(quantity)
            first_line = (str(error).strip().splitlines() or [""])[0]
            warnings.warn(
                f"{self._owner} leaves out {quantity!r}, which it cannot measure of this model and data: "
                f"{type(error).__name__}: {first_line}",
                stacklevel=2,
            )
            return None
