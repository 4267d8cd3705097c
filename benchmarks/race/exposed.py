"""Where a planned step spends what it takes beyond backward and optimizer, from the recorder's spans."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from espresso_ds.core.run_trace import Mark, RunStep, RunTrace
from espresso_ds.planner.cost import LINKS
from espresso_ds.planner.measured import at_work
from espresso_ds.runtime.trace import run_trace

Interval = tuple[float, float]


def recorded(attachment: Any, rank: int, steps: int) -> RunTrace:
    """What a rank recorded of its last steps, at most `steps`."""
    run = run_trace(attachment.recorder, attachment.plan, rank=rank, device="cpu", made_by="benchmarks.race")
    return run.model_copy(update={"steps": run.steps[-steps:]})


def of(run: RunTrace) -> dict[str, float]:
    """Medians over a run's steps: seconds after backward that its rank waits for codecs, and for links.

    Compression is exposed while a codec or a copy works and no link does; the rest of the wait is communication's.
    """
    found = [split(run, step) for step in run.steps]
    compression, communication = (statistics.median(seconds) for seconds in zip(*found, strict=True))
    return {"exposed_compression_s": round(compression, 6), "exposed_communication_s": round(communication, 6)}


def split(run: RunTrace, step: RunStep) -> Interval:
    """Seconds of one step's wait that are compression's and communication's."""
    wait = step.whole(Mark.FLUSH)
    work = at_work(run, step)
    link = union(_clipped(((w.start_s, w.end_s) for w in work if w.resource in LINKS), wait.start_s, wait.end_s))
    every = union(_clipped(((w.start_s, w.end_s) for w in work), wait.start_s, wait.end_s))
    compression = length(every) - length(link)
    return compression, wait.end_s - wait.start_s - compression


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points as disjoint intervals, ascending."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def length(intervals: Iterable[Interval]) -> float:
    """Sum of the lengths."""
    return sum(end - start for start, end in intervals)


def _clipped(intervals: Iterable[Interval], low: float, high: float) -> Iterable[Interval]:
    return ((max(start, low), min(end, high)) for start, end in intervals if end > low and start < high)
