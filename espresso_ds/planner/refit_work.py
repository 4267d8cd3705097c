"""A recorded step as the timeline has it: each resource serves one piece of work at a time, first come first served.

`measured.at_work` does so for links and takes every end as it stands. Two things more are needed before costs can be fitted:

- Codec work and copies of several lanes overlap in a run, while the model has one server of codec work. Each then gets its share.
- A routine is seen complete by the thread of the next lane, which may have been busy with an earlier unit: its recorded end is
  then the moment at which that thread was free again, which says only that the routine was complete by then. Such an end is
  replaced by the predicted one, if that is earlier, and the work is marked as `hidden`: nothing can be learned from it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from ..core.option import Device, Level, Option
from ..core.run_trace import Mark, RunSpan, RunStep, RunTrace
from .cost import LINKS, Resource
from .measured import COPIES, resource_of

HANDED_ON_S = 3e-4
"""A thread that is free again sees a routine complete within this time, if it is."""


class Served(NamedTuple):
    """One action of a unit, or a copy (`action` is then a `Mark`), while its resource served it; seconds since the last step."""

    unit: int
    action: int
    resource: Resource
    start_s: float
    end_s: float
    hidden: bool = False

    @property
    def seconds(self) -> float:
        """How long it was at work."""
        return self.end_s - self.start_s


def served(run: RunTrace, step: RunStep, predicted_s: Sequence[Sequence[float]]) -> list[Served]:
    """All work of a recorded step, by start.

    Args:
        run: the trace.
        step: one of its steps.
        predicted_s: seconds of each action of each of the run's units.
    """
    options = [Option.parse(unit.option) for unit in run.units]
    spans = sorted((s for s in step.spans if s.action >= 0 or s.action in COPIES), key=lambda s: (s.start_s, s.end_s))
    seen = _seen_late(spans, options)
    found, busy_until = [], dict.fromkeys(LINKS, 0.0)
    of_codecs = []
    for span in spans:
        at = Device.CPU if span.action < 0 else options[span.unit].actions[span.action].at
        resource = resource_of(at, run.nodes)
        if resource not in busy_until:
            of_codecs.append(span)
            continue
        start = min(max(span.start_s, busy_until[resource]), span.end_s)
        end, hidden = span.end_s, span in seen
        if hidden:
            end = min(end, start + predicted_s[span.unit][span.action])
        busy_until[resource] = max(busy_until[resource], end)
        found.append(Served(span.unit, span.action, resource, start, end, hidden))
    return sorted([*found, *_in_turns(of_codecs)], key=lambda piece: piece.start_s)


def _in_turns(spans: Sequence[RunSpan]) -> Iterator[Served]:
    """Codec work that overlaps, as if threads had taken turns: of the time that n share, each has an n-th."""
    edges = sorted({time for span in spans for time in (span.start_s, span.end_s)})
    begin = 0
    waiting = sorted(spans, key=lambda span: span.start_s)
    under_way: list[RunSpan] = []
    for start, end in pairwise(edges):
        while begin < len(waiting) and waiting[begin].start_s <= start:
            under_way.append(waiting[begin])
            begin += 1
        under_way = [span for span in under_way if span.end_s > start]
        turn = (end - start) / max(1, len(under_way))
        for place, span in enumerate(under_way):
            yield Served(span.unit, span.action, Resource.CPU, start + place * turn, start + (place + 1) * turn)


def _seen_late(spans: Sequence[RunSpan], options: Sequence[Option]) -> set[RunSpan]:
    """The routines that ended, as far as was seen, right after other work of the thread that waits for them."""
    free: dict[int, list[float]] = {}  # by lane: when its thread was done with something
    routines: list[tuple[int, RunSpan]] = []
    for span in spans:
        actions = options[span.unit].actions
        before = actions if span.action == Mark.COPY_OUT else actions[: max(0, span.action)]
        lane = sum(isinstance(action.at, Level) for action in before)
        if span.action >= 0 and isinstance(actions[span.action].at, Level):
            routines.append((lane, span))
        else:
            free.setdefault(lane, []).append(span.end_s)
    for ends in free.values():
        ends.sort()
    late = set()
    for lane, span in routines:
        ends = free.get(lane + 1, [])
        place = bisect_right(ends, span.end_s) - 1
        if place >= 0 and ends[place] > span.start_s and span.end_s - ends[place] <= HANDED_ON_S:
            late.add(span)
    return late
