"""The whole decision: which tensors share a buffer, and which option each buffer gets.

Fusing changes what compression is worth and compression changes what fusing is worth, so that neither can simply go first.
Algorithm 1 on single tensors pays a latency for every small one, and options that differ between neighbours keep them from being
fused. Fusing first, on the slow uncompressed timeline, makes buffers so large that, once compressed, they can no longer hide
under the backward. Hence a few starts, each improved by Algorithm 1 and then fused, of which the one with the least F(S) is kept
and improved again until it gains no more:

    single   every tensor by itself, uncompressed: Algorithm 1 as published
    fused    the best plan of allreduces alone
    buckets  tensors gathered up to a size, for each of BUCKETS; once uncompressed, once with the one option that suits best

All is deterministic; of equal plans the first is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ..core.option import UNCOMPRESSED, Option
from ..core.profile import ModelTrace
from .cost import Costs
from .decide import ROUNDING, decide, drop_idle, spare
from .fuse import buckets, fuse, singles
from .timeline import Unit, iteration_time

BUCKETS = tuple(2**power for power in range(14, 29))
"""Least numbers of elements in a unit that are tried."""

WORTHWHILE = 0.01
"""Least share of the uncompressed step that compression must save: less is within the noise of any step time, and it is lossy."""

Progress = Callable[[str, int, int], None]


def plan_uncompressed(trace: ModelTrace, costs: Costs) -> list[Unit]:
    """The fastest plan found in which all tensors are allreduced, overlapped with backward and fused. Raises FileError."""
    starts = min(partitions(trace), key=lambda units: iteration_time(units, trace, costs))
    ways = (fuse(singles(trace), trace, costs), fuse(starts, trace, costs))
    return min(ways, key=lambda units: iteration_time(units, trace, costs))


def plan_compressed(
    options: Sequence[Option],
    trace: ModelTrace,
    costs: Costs,
    uncompressed: Sequence[Unit],
    thrift: float = 0.0,
    progress: Progress = lambda stage, done, total: None,
) -> list[Unit]:
    """The fastest plan found, which is `uncompressed` itself unless compression saves WORTHWHILE of its step time.

    The plan may be slower than that by the share `thrift`, for fewer compressed tensors.

    Args:
        options: candidates for every unit.
        trace: tensors in the order of the wire.
        costs: what actions cost.
        uncompressed: what `plan_uncompressed` gave.
        thrift: share of the step that is given for leaving uncompressed what compression helps least.
        progress: called with (what is tried, starts done, all starts).

    Raises:
        FileError: a cost was not measured.
    """
    best, best_s = list(uncompressed), iteration_time(uncompressed, trace, costs)
    limit = best_s * (1 - WORTHWHILE)
    if trace.compute_s >= limit:
        return best  # even synchronisation that takes no time would not be worth it
    starts = list(_starts(options, trace, costs, uncompressed))
    for done, start in enumerate(starts):
        progress(f"planning in {len(start)} units", done, len(starts))
        units, time = _round(start, options, trace, costs)
        if time < best_s:
            best, best_s = units, time
    while True:
        units, time = _round(best, options, trace, costs)
        if time >= best_s * (1 - ROUNDING):
            break
        best, best_s = units, time
    if best_s > limit:
        return list(uncompressed)
    return fuse(spare(best, trace, costs, min(limit, best_s * (1 + thrift))), trace, costs)


def _round(units: Sequence[Unit], options: Sequence[Option], trace: ModelTrace, costs: Costs) -> tuple[list[Unit], float]:
    """Algorithm 1, then fuse; the units and their F(S)."""
    decided = drop_idle(decide(units, options, trace, costs), trace, costs)
    fused = fuse(decided, trace, costs)
    return fused, iteration_time(fused, trace, costs)


def partitions(trace: ModelTrace) -> Iterator[list[Unit]]:
    """The different ways in which BUCKETS cut the trace, uncompressed, from the finest."""
    last = None
    for numel in BUCKETS:
        units = buckets(trace, numel)
        if units != last:
            yield units
        last = units


def _starts(options: Sequence[Option], trace: ModelTrace, costs: Costs, uncompressed: Sequence[Unit]) -> Iterator[Sequence[Unit]]:
    yield singles(trace)
    yield uncompressed
    for units in partitions(trace):
        yield units
        uniform = [[Unit.of(trace, unit.start, unit.stop, option) for unit in units] for option in options]
        best = min(uniform, key=lambda plan: iteration_time(plan, trace, costs))
        if best[0].option != UNCOMPRESSED:
            yield best
