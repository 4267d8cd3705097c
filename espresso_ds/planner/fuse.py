"""Units: which tensors travel as one buffer. Every unit costs a latency, but a fused one waits for its last tensor.

The idea of MergeComp (Wang et al., 2021): compress and send groups of tensors, the groups found by trying them on a model of
the step.
"""

from __future__ import annotations

from collections.abc import Collection

from ..core.option import UNCOMPRESSED
from ..core.profile import ModelTrace
from .limits import Limits
from .menu import Choice
from .timeline import Unit
from .trials import ROUNDING, Trials

PLAIN = Choice(UNCOMPRESSED)

BUCKETS = tuple(2**power for power in range(14, 29))
"""Least numbers of elements in a unit that are tried."""


Cut = list[tuple[int, int]]
"""Runs of tensors (start, stop), each a unit."""


def singles(trace: ModelTrace, choice: Choice = PLAIN) -> list[Unit]:
    """A unit for every tensor, in the order of the trace."""
    return [Unit.of(trace, index, index + 1, *choice) for index in range(len(trace.tensors))]


def buckets(trace: ModelTrace, numel: int, exact: Collection[int] = (), apart: bool = False) -> Cut:
    """Runs of tensors (start, stop) that close once they have `numel` elements; the last takes what is left.

    They also close where the dtype changes, between tensors that are never compressed (`exact`) and others, and, if they are kept
    `apart`, before a tensor of `numel` elements or more.
    """
    runs: Cut = []
    start, filled = 0, 0
    for index, tensor in enumerate(trace.tensors):
        before = trace.tensors[index - 1]
        unlike = tensor.dtype != before.dtype or (index in exact) != (index - 1 in exact)
        if index > start and (unlike or (apart and tensor.numel >= numel)):
            runs.append((start, index))
            start, filled = index, 0
        filled += tensor.numel
        if filled >= numel:
            runs.append((start, index + 1))
            start, filled = index + 1, 0
    if start < len(trace.tensors):
        runs.append((start, len(trace.tensors)))
    return runs


def partitions(trace: ModelTrace, exact: Collection[int] = ()) -> list[list[Cut]]:
    """For each size of BUCKETS the different ways to cut the trace by it that no smaller size gives, finest size first."""
    seen: list[Cut] = []
    found = []
    for numel in BUCKETS:
        ways = [buckets(trace, numel, exact, apart) for apart in (False, True)]
        fresh = [cut for place, cut in enumerate(ways) if cut not in seen and cut not in ways[:place]]
        seen += fresh
        if fresh:
            found.append(fresh)
    return found


def fuse(trials: Trials, limits: Limits) -> None:
    """Merge neighbours, in place, as long as F(S) does not get worse; both then go as the one or as the other did.

    Greedy, from the first unit to the last, again until nothing changes. A merge that leaves F(S) as it is counts as a gain: it
    spares a collective call, whose cost to the processor the model does not know.
    """
    changed = True
    while changed:
        changed = False
        places = trials.places
        left = places[0]
        for right in places[1:]:
            if _merged(trials, limits, left, right):
                changed = True
            left = right


def _merged(trials: Trials, limits: Limits, left: int, right: int) -> bool:
    a, b = trials.at(left), trials.at(right)
    if a.dtype != b.dtype or a.chunk_numel or b.chunk_numel:
        return False
    most = trials.time * (1 + ROUNDING)
    best, chosen = most, -1
    for choice in {trials.choice(right), trials.choice(left)}:
        if limits.allow_merged(trials, left, right, choice):
            time = trials.time_merged(left, right, choice, best)
            if time <= best:
                best, chosen = time, choice
    if chosen < 0:
        return False
    trials.merge(left, right, chosen)
    return True
