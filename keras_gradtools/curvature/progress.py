"""A progress bar for work that turns out to be long."""

import time

import keras


class Progress:
    """Counts `total` parts of some work; with `verbose="auto"` a bar is shown once it has taken a while.

    `total` may be None, where it is not known.
    """

    QUIET_SECONDS = 3.0

    def __init__(self, total, title, verbose, unit="product"):
        self._total, self._title, self._unit = total, title, unit
        self._done = 0
        self._bar = None
        self._shows_from = {0: float("inf"), 1: 0.0, "auto": self.QUIET_SECONDS}[verbose]

    def __enter__(self):
        self._started = time.monotonic()
        return self

    def __exit__(self, *exception):
        if self._bar is not None and self._done != self._total:
            # The work was less than expected, or failed: the next line shall not be the bar's.
            self._bar.update(self._done, finalize=True)

    def update(self):
        self._done += 1
        is_last = self._done == self._total
        if self._bar is None and not is_last and time.monotonic() - self._started >= self._shows_from:
            print(self._title)
            self._bar = keras.utils.Progbar(self._total, unit_name=self._unit)
        if self._bar is not None:
            self._bar.update(self._done)

    def after(self, result):
        """Returns `result`, which one more part of the work has given."""
        self.update()
        return result
