"""Progress of long work: one bar in a terminal or a notebook, and a line at its start and its end in a log file."""

import threading
import time

import keras

from keras_gradtools.display import progress_views


class Progress:
    """Counts `total` parts of some work, and shows them with a title, the time and a remark.

    With `verbose="auto"`, nothing appears before `QUIET_SECONDS`. `total` is None if the number is unknown: a spinner
    then takes the place of the bar. Inside another `Progress`, it becomes a remark of that one.
    """

    QUIET_SECONDS = 3.0

    def __init__(self, total, title, verbose, unit="product"):
        self.total, self.title, self.unit = total, title, unit
        self.done, self.remark = 0, ""
        self._view = self._outer = None
        self._shows_from = {0: float("inf"), 1: 0.0, "auto": self.QUIET_SECONDS}[verbose]

    def __enter__(self):
        self.started = time.monotonic()
        self._outer = _open.entered[-1] if _open.entered else None
        _open.entered.append(self)
        self._show()
        return self

    def __exit__(self, kind=None, *error):
        _open.entered.remove(self)
        if self._outer is not None:
            self._outer.note("")
        elif self._view is not None:
            self._view.end(self, kind is not None)
            self._view = None

    def update(self):
        """Counts one part of the work."""
        self.done += 1
        self._show()

    def after(self, result):
        """Counts one part of the work and returns its `result`."""
        self.update()
        return result

    def note(self, remark):
        """Sets the remark, such as the residual of an iteration."""
        self.remark = remark
        self._show()

    @property
    def seconds(self):
        return time.monotonic() - self.started

    @property
    def count(self):
        """What is done, such as `"3/12 batches"`."""
        unit = self.unit if (self.total or self.done) == 1 else _PLURALS.get(self.unit, f"{self.unit}s")
        return f"{self.done}{'' if self.total is None else f'/{self.total}'} {unit}"

    def _show(self):
        if self._outer is not None:
            self._outer.note(f"{self.title}: {', '.join(filter(None, (self.count, self.remark)))}")
        elif self._view is not None:
            self._view.refresh(self)
        elif self.seconds >= self._shows_from and self.done != self.total and _is_interactive():
            self._view = progress_views.view_of(self)


_PLURALS = {"loss": "losses", "batch": "batches"}


class _Open(threading.local):
    """The objects whose blocks a thread has entered, the outermost first."""

    def __init__(self):
        self.entered: list[Progress] = []


_open = _Open()


def _is_interactive():
    # `keras.utils.disable_interactive_logging` turns off Keras' own bars, too.
    return keras.config.is_interactive_logging_enabled()
