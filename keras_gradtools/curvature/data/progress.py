"""A progress bar that appears only if the work takes long."""

import time

import keras


class Progress:
    """Counts `total` parts of some work. With `verbose="auto"`, a bar appears after `QUIET_SECONDS`.

    `total` is None if the number is unknown.
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
            # The work took fewer parts than expected, or failed. Ends the line of the bar.
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
        """Counts one part of the work and returns its `result`."""
        self.update()
        return result
