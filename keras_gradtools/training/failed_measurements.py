"""Lets training continue if a callback cannot measure a quantity: it warns once and leaves the quantity out."""

import warnings


class FailedMeasurements:
    """Remembers which quantities failed, so that they are not tried again."""

    def __init__(self, owner):
        self._owner = owner
        self._given_up: set[str] = set()

    def tried(self, quantity, compute):
        """Returns `compute()`, or None if it raises. The first failure warns, and the quantity is not tried again."""
        if quantity in self._given_up:
            return None
        try:
            return compute()
        except Exception as error:  # a monitor must not stop the training
            self._given_up.add(quantity)
            first_line = (str(error).strip().splitlines() or [""])[0]
            warnings.warn(
                f"{self._owner} leaves out {quantity!r}, which it cannot measure for this model and data: "
                f"{type(error).__name__}: {first_line}",
                stacklevel=2,
            )
            return None
