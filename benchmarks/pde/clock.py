"""The CPU time of this process that training has taken, and the errors at fixed times."""

import time

RECORDS = 40


class OutOfTime(Exception):
    """The time is spent."""


class Clock:
    """Counts the CPU time between `start` and each `tick`, without the time that the errors take.

    Attributes:
        spent: Seconds so far.
        seconds, errors: The records.
        steps: The number of ticks.
    """

    def __init__(self, error, limit, spent=0.0, seconds=(), errors=()):
        self._error, self.limit, self.spent, self.steps = error, limit, spent, 0
        self.seconds, self.errors = list(seconds), list(errors)
        self._begin = 0.0

    def start(self):
        self._begin = time.process_time()

    def tick(self, weights, steps=1):
        """Ends a step. `weights()` returns the weights. Raises `OutOfTime` if the time is spent."""
        self.spent += time.process_time() - self._begin
        self.steps += steps
        last = self.seconds[-1] if self.seconds else 0.0
        if self.spent >= min(self.limit, last + self.limit / RECORDS):
            self.record(weights())
        if self.spent >= self.limit:
            raise OutOfTime
        self._begin = time.process_time()

    def record(self, weights):
        self.seconds.append(round(self.spent, 3))
        self.errors.append(self._error(weights))
