"""Paired timing: two functions, run in turn in one process, compared pair by pair.

Whatever else the machine is doing at a moment slows both members of a pair alike, so that the ratio of a
pair is steadier than the ratio of two averages; the median over the pairs ignores those torn apart.
"""

import dataclasses
import math
import statistics
import time


@dataclasses.dataclass
class Comparison:
    """Milliseconds of both, and the ratio of the first to the second: its median over `pairs` pairs.

    The middle half of the pairs lies between `low` and `high`. With 95% confidence a run without end would
    have its median between `surely_above` and `surely_below`: what the target has to be judged by.
    `cpu_ratio` is the median ratio of CPU times, which other work on the machine disturbs less than it does
    the clock on the wall. `cpus` is how many processors the process has kept busy: more than 1 belies the
    claim of one thread.
    """

    ours_ms: float
    theirs_ms: float
    ratio: float
    low: float
    high: float
    surely_above: float
    surely_below: float
    pairs: int
    cpu_ratio: float
    cpus: float


def seconds(fun, block):
    """Returns the seconds that a run takes: on the wall, and of the processors."""
    wall, cpu = time.perf_counter(), time.process_time()
    block(fun())
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(ours, theirs, block, at_least=15, at_most=201, for_seconds=2.5):
    """Times `ours` and `theirs` in turn. Both have to be warm; `block` waits for a result."""
    pairs = []
    wall, cpu = time.perf_counter(), time.process_time()
    end = wall + for_seconds
    while len(pairs) < at_least or (len(pairs) < at_most and time.perf_counter() < end):
        # Each goes first in every other pair: the caches that the first one leaves would favour the second.
        if len(pairs) % 2:
            b = seconds(theirs, block)
            a = seconds(ours, block)
        else:
            a = seconds(ours, block)
            b = seconds(theirs, block)
        pairs.append((a, b))
    cpus = (time.process_time() - cpu) / (time.perf_counter() - wall)
    ratios = sorted(a / b for (a, _), (b, _) in pairs)
    low, ratio, high = statistics.quantiles(ratios, n=4)
    # How many of the pairs fall below the true median is binomial, whatever their distribution is.
    off_centre = 0.98 * len(ratios) ** 0.5
    first, last = math.floor(len(ratios) / 2 - off_centre), math.ceil(len(ratios) / 2 + off_centre)
    return Comparison(
        ours_ms=1e3 * statistics.median(a for (a, _), _ in pairs),
        theirs_ms=1e3 * statistics.median(b for _, (b, _) in pairs),
        ratio=ratio,
        low=low,
        high=high,
        surely_above=ratios[max(first, 0)],
        surely_below=ratios[min(last, len(ratios) - 1)],
        pairs=len(pairs),
        cpu_ratio=statistics.median(a / b for (_, a), (_, b) in pairs),
        cpus=cpus,
    )
