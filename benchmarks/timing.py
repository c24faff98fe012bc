"""Paired timing: two functions run alternately in one process and are compared pair by pair.

Other load on the machine slows both runs of a pair alike, so the ratio of a pair is more stable than the ratio of two
averages. The median over the pairs ignores outliers.
"""

import dataclasses
import math
import statistics
import time


@dataclasses.dataclass
class Comparison:
    """The median milliseconds of both, and the median ratio of the first to the second over `pairs` pairs.

    `low` and `high` are the quartiles of the ratio. `surely_above` and `surely_below` bound the 95% confidence interval
    of its median, with which the target is compared. `cpu_ratio` is the median ratio of CPU times, which other load on
    the machine disturbs less than wall-clock times. `cpus` is the average number of busy processors. If it exceeds 1,
    the run was not single-threaded.
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
    """Returns the wall-clock seconds and the CPU seconds of one run."""
    wall, cpu = time.perf_counter(), time.process_time()
    block(fun())
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(ours, theirs, block, at_least=15, at_most=201, for_seconds=2.5):
    """Times `ours` and `theirs` alternately. Both must be warmed up. `block` waits for a result."""
    pairs = []
    wall, cpu = time.perf_counter(), time.process_time()
    end = wall + for_seconds
    while len(pairs) < at_least or (len(pairs) < at_most and time.perf_counter() < end):
        # They take turns in going first, because the second of a pair profits from warm caches.
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
    # The number of pairs below the true median is binomial for every distribution of the ratios.
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
