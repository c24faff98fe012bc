"""The measurement of a row: all ways are prepared, compared, and timed in turns."""

import statistics
import time

import numpy as np

from benchmarks.three_backends.connection import Failed

ROUNDS, LEAST_ROUNDS = 15, 3
# The largest difference of two backends, relative to the largest value. All compute in single precision.
TOLERANCE = 1e-4
SECONDS_TO_PREPARE, SECONDS_TO_TIME = 600, 60


class Clock:
    """The time that is left, shared among the rows that are left. Without `seconds` there is no end."""

    def __init__(self, seconds, rows):
        self._end = time.perf_counter() + seconds if seconds else float("inf")
        self._rows = rows

    def begin_row(self):
        now = time.perf_counter()
        self._end_of_row = now + max(self._end - now, 0) / self._rows
        self._rows -= 1

    def seconds_to_prepare(self):
        """At most a quarter of what is left for all rows."""
        return min(max((self._end - time.perf_counter()) / 4, SECONDS_TO_TIME), SECONDS_TO_PREPARE)

    def is_over(self):
        return time.perf_counter() > self._end

    def row_is_over(self):
        return time.perf_counter() > self._end_of_row


def measure(number, connections, clock, rounds, together=False, of_cpu=False):
    """A dict from names of ways to cells: times, or the reason why there are none.

    `together` prepares all ways at the same time. `of_cpu` takes the CPU time of the processes.
    """
    clock.begin_row()
    cells = _prepared(number, connections, clock, together)
    _compare(cells)
    seconds = _timed([c for c in connections if "reason" not in cells[c.way.name]], cells, clock, rounds)
    if not seconds:
        return cells
    taken = {name: [cpu if of_cpu else wall for wall, cpu in found] for name, found in seconds.items()}
    fastest = min(taken, key=lambda name: statistics.median(taken[name]))
    for name, found in taken.items():
        cells[name] |= {
            "ms": 1e3 * statistics.median(found),
            "cpu_ms": 1e3 * statistics.median(cpu for _, cpu in seconds[name]),
            # Of the times in one round, which other load on the machine slows alike.
            "ratio": statistics.median(a / b for a, b in zip(found, taken[fastest], strict=True)),
            "cpus": sum(cpu for _, cpu in seconds[name]) / sum(wall for wall, _ in seconds[name]),
            "rounds": len(found),
        }
    return cells


def _prepared(number, connections, clock, together):
    cells: dict = {}
    waiting = []
    for connection in connections:
        if clock.is_over() and connection.way.may_be_left_out:
            cells[connection.way.name] = {"reason": "the time was up"}
            continue
        try:
            connection.prepare(number)
        except Failed as failed:
            cells[connection.way.name] = {"reason": str(failed)}
            continue
        waiting.append(connection)
        if not together:
            _receive(waiting, cells, clock)
    _receive(waiting, cells, clock)
    return cells


def _receive(waiting, cells, clock):
    while waiting:
        connection = waiting.pop(0)
        try:
            cells[connection.way.name] = connection.receive(clock.seconds_to_prepare())
        except Failed as failed:
            cells[connection.way.name] = {"reason": str(failed)}


def _compare(cells):
    """Replaces the values by their difference from those of the first way, or by a reason if it is too large."""
    found = [name for name in cells if "reason" not in cells[name]]
    values = {name: cells[name].pop("values") for name in found}
    for name in found:
        cells[name]["difference"] = difference = _difference(values[name], values[found[0]])
        # The `not` makes a NaN count as a difference.
        if not difference <= TOLERANCE:
            cells[name] = {"reason": f"its values differ from those of {found[0]} by {difference:.0e}, relatively"}


def _difference(ours, theirs):
    """The largest difference, relative to the largest of all values."""
    if [a.shape for a in ours] != [b.shape for b in theirs]:
        return float("inf")
    largest = max(np.abs(b).max() for b in theirs)
    return float(max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True)) / largest)


def _timed(connections, cells, clock, rounds):
    """The times of each way, one for each round. Another way goes first in each round."""
    seconds: dict = {connection.way.name: [] for connection in connections}
    for done in range(rounds):
        if done >= LEAST_ROUNDS and clock.row_is_over():
            break
        first = done % max(len(connections), 1)
        for connection in connections[first:] + connections[:first]:
            try:
                seconds[connection.way.name].append(connection.time(SECONDS_TO_TIME))
            except Failed as failed:
                cells[connection.way.name] = {"reason": str(failed)}
                connections = [c for c in connections if c is not connection]
                del seconds[connection.way.name]
    return seconds
