"""What short calls take where ranks take turns on cores, which the median of single calls does not show.

A scheduler lets a thread run for some milliseconds. A shorter call is mostly not interrupted, whoever else waits for its core,
but one of many waits for all of them. So the median is that of a core of one's own; how many calls a second holds, the mean says.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

CROWDED = 1.25
"""Means this many times the median and above are no disturbance."""
FEWEST, LEFT_OUT = 64, 1 / 32
"""Calls at least, and the share of them, the longest, that does not count: turns on a core are frequent, a pause is not."""


def crowding(call: Callable[[], None], seconds: float, clock: Callable[[], float] = time.perf_counter) -> float:
    """Mean over median of calls for so many seconds, while all other ranks do the same.

    2 where two take turns on a core; 1 for less than `CROWDED`. A call must be shorter than a scheduler's slice, 3 ms or so.
    """
    taken: list[float] = []
    start = end = clock()
    while end - start < seconds or len(taken) < FEWEST:
        before = end
        call()
        end = clock()
        taken.append(end - before)
    counted = sorted(taken)[: len(taken) - math.ceil(len(taken) * LEFT_OUT)]
    found = statistics.fmean(counted) / statistics.median(counted)
    return found if found >= CROWDED else 1.0


def in_the_mean(numel: Sequence[int], seconds: Sequence[float], crowded: float, typical: int) -> tuple[float, ...]:
    """Mean seconds for each number of elements (ascending), from medians that see interruptions only in long calls.

    Args:
        numel, seconds: of the medians.
        crowded: `crowding` of calls with `typical` elements.
        typical: elements of a call that is mostly not interrupted, and is no better off in caches than larger ones.
    """
    at = min(range(len(numel)), key=lambda place: abs(numel[place] - typical))
    rate = seconds[at] / numel[at]
    return tuple(max(s, crowded * min(s, rate * n)) for n, s in zip(numel, seconds, strict=True))
