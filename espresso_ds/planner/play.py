"""The event loop of the timeline: lanes and resources, as timeline.py's picture has them.

This is the reference that the native timeline of the search (csrc/timeline.cpp) is tested against.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from .cost import LINKS, Resource

_INF = float("inf")
_COMPUTE, _CPU = int(Resource.COMPUTE), int(Resource.CPU)
_LINKS = frozenset(map(int, LINKS))

LeanWalk = tuple[tuple[int, float], ...]
"""(resource, seconds) of each step of a unit."""


def play(
    walks: Sequence[LeanWalk],
    ready_s: Sequence[float],
    backward_s: float,
    contention: float,
    link_contention: float,
    handling_s: float = 0.0,
    log: list[tuple[int, int, int, float, float]] | None = None,
    became_ready: list[float] | None = None,
) -> tuple[float, float]:
    """Play the units through lanes and resources, event by event; return the ends of backward and of the last synchronisation.

    Times count from the start of backward. The next event is the next unit becoming ready or one of the resources finishing; the
    earlier unit goes first where two fall together. An empty walk is a unit that does nothing.

    Args:
        walks: steps of each unit, in plan order.
        ready_s: progress of backward at which each unit is ready, not descending.
        backward_s: duration of an undisturbed backward.
        contention: seconds by which one second of codec work on the CPU delays the backward.
        link_contention: the same of a busy link.
        handling_s: seconds by which each routine of a unit that is ready delays the backward, whatever its size.
        log: gets each step as (unit, step, resource, start, end), in the order in which they end.
        became_ready: gets the time at which the slowed-down backward made each unit ready.
    """
    count = len(walks)
    targets = [*ready_s, backward_s]  # how far backward must be; the last entry is its end
    lane_of = [_lanes(walk) for walk in walks]  # of each step
    begins = [[lanes.index(lane) for lane in range(lanes[-1] + 1)] if lanes else [] for lanes in lane_of]
    routines = [sum(resource in _LINKS for resource, _ in walk) for walk in walks]
    sent = [0] * count  # routines that are complete
    upcoming = 0
    progress = 0.0  # of backward, in seconds of undisturbed backward
    rate = 1.0
    now = synced = backward_end = 0.0
    lanes = 2 + max(routines, default=0)
    following = [0] * lanes  # the unit that each lane takes next
    passed = [0] * lanes  # units before this one have been handed to the lane
    serving = [False] * lanes
    queues: tuple[deque[tuple[int, int]], ...] = tuple(deque() for _ in Resource)
    at: list[tuple[int, int]] = [(-1, 0) for _ in Resource]  # (unit, step) on each resource
    begun = [0.0 for _ in Resource]
    until = [_INF for _ in Resource]
    shared = 1.0 + contention  # how much longer codec work on the CPU takes while backward runs, and backward beside it

    def request(unit: int, step: int) -> None:
        resource, seconds = walks[unit][step]
        if at[resource][0] >= 0:
            queues[resource].append((unit, step))
            return
        at[resource] = unit, step
        begun[resource] = now
        until[resource] = now + (seconds * shared if resource == _CPU and upcoming <= count else seconds)

    def serve(lane: int) -> None:
        """Let the lane take units until one occupies it with codec work."""
        while not serving[lane] and following[lane] < passed[lane]:
            unit = following[lane]
            following[lane] += 1
            if lane < len(begins[unit]):
                step = begins[unit][lane]
                request(unit, step)
                serving[lane] = walks[unit][step][0] not in _LINKS

    def hand_on(lane: int) -> None:
        """Pass the units to the lane whose routine before it is complete, as far as plan order allows."""
        while passed[lane] < passed[0] and (routines[passed[lane]] < lane or sent[passed[lane]] >= lane):
            passed[lane] += 1

    while True:
        # The next event. All of a later unit's events at the same time come after those of an earlier one.
        time, unit, source = _INF, count + 1, -1
        if upcoming <= count:
            wait = targets[upcoming] - progress
            if wait <= 0:
                time, unit = now, upcoming
            elif rate > 0:
                time, unit = now + wait / rate, upcoming
        for resource, end in enumerate(until):
            if end < time or (end == time and end < _INF and at[resource][0] < unit):
                time, unit, source = end, at[resource][0], resource
        if unit > count:
            return backward_end, synced
        progress += (time - now) * rate
        now = time

        if source < 0:  # a unit is ready, or backward ends
            upcoming += 1
            if unit == count:
                backward_end = now
                if at[_CPU][0] >= 0:
                    until[_CPU] = now + (until[_CPU] - now) / shared
            else:
                if became_ready is not None:
                    became_ready.append(now)
                progress -= handling_s * routines[unit]
                passed[0] = upcoming
                serve(0)
        else:
            step = at[source][1]
            if log is not None:
                log.append((unit, step, source, begun[source], now))
            at[source], until[source] = (-1, 0), _INF
            if queues[source]:  # who waits came before whoever is about to ask
                request(*queues[source].popleft())
            more = step + 1 < len(walks[unit])
            lane = lane_of[unit][step]
            if not more:
                synced = now
            if source in _LINKS:
                sent[unit] += 1
                hand_on(lane + 1)
                serve(lane + 1)
            elif more and walks[unit][step + 1][0] not in _LINKS:
                request(unit, step + 1)  # the lane stays with the unit
            else:
                if more:
                    request(unit, step + 1)
                serving[lane] = False
                serve(lane)
        if at[_COMPUTE][0] >= 0:
            rate = 0.0
        else:
            links = sum(at[link][0] >= 0 for link in _LINKS)
            rate = 1.0 / (1.0 + (contention if at[_CPU][0] >= 0 else 0.0) + links * link_contention)


def _lanes(walk: LeanWalk) -> list[int]:
    """The lane of each step: the number of routines before it."""
    lanes, lane = [], 0
    for resource, _ in walk:
        lanes.append(lane)
        lane += resource in _LINKS
    return lanes
