"""Units: which tensors travel as one buffer. Every unit costs a latency, but a fused one waits for its last tensor.

The idea of MergeComp (Wang et al., 2021): compress and send groups of tensors, the groups found by trying them on a model of
the step.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..core.option import UNCOMPRESSED, Option
from ..core.profile import ModelTrace
from .cost import Costs
from .decide import ROUNDING
from .timeline import Unit, iteration_time


def singles(trace: ModelTrace, option: Option = UNCOMPRESSED) -> list[Unit]:
    """A unit for every tensor, in the order of the trace."""
    return [Unit.of(trace, index, index + 1, option) for index in range(len(trace.tensors))]


def buckets(trace: ModelTrace, numel: int, option: Option = UNCOMPRESSED) -> list[Unit]:
    """Units that close once they have `numel` elements or the dtype changes; the last takes what is left."""
    units, start, filled = [], 0, 0
    for index, tensor in enumerate(trace.tensors):
        if filled and tensor.dtype != trace.tensors[index - 1].dtype:
            units.append(Unit.of(trace, start, index, option))
            start, filled = index, 0
        filled += tensor.numel
        if filled >= numel:
            units.append(Unit.of(trace, start, index + 1, option))
            start, filled = index + 1, 0
    if filled:
        units.append(Unit.of(trace, start, len(trace.tensors), option))
    return units


def fuse(units: Sequence[Unit], trace: ModelTrace, costs: Costs) -> list[Unit]:
    """Merge neighbours of equal option and dtype as long as F(S) does not get worse.

    Greedy, from the first unit to the last, again until nothing changes. A merge that leaves F(S) as it is counts as a gain: it
    spares a collective call, whose cost to the processor the model does not know.

    Raises:
        FileError: a cost was not measured.
    """
    merged = list(units)
    time = iteration_time(merged, trace, costs)
    changed = True
    while changed:
        changed, index = False, 0
        while index + 1 < len(merged):
            left, right = merged[index], merged[index + 1]
            if (left.option, left.dtype) == (right.option, right.dtype):
                trial = [*merged[:index], Unit.of(trace, left.start, right.stop, left.option), *merged[index + 2 :]]
                trial_time = iteration_time(trial, trace, costs)
                if trial_time <= time * (1 + ROUNDING):
                    merged, time, changed = trial, min(time, trial_time), True
                    continue
            index += 1
    return merged
