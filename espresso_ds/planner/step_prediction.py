"""The predicted step, unit by unit: what a plan keeps of its timeline, for comparison with a run."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.plan import StepPrediction, UnitPrediction
from ..core.profile import ModelTrace
from .cost import Costs
from .memory import memory_of, precision_of
from .timeline import Timeline, Unit, simulate

_DIGITS = 6  # microseconds: plans travel by environment, so they have to stay small


def step_prediction(units: Sequence[Unit], trace: ModelTrace, costs: Costs) -> StepPrediction:
    """What the timeline predicts for each of these units, in plan order. Raises FileError (a cost was not measured)."""
    timeline = simulate(units, trace, costs)
    seconds = _seconds_of_actions(timeline)
    done = [0.0] * len(seconds)
    for span in timeline.spans:
        if span.unit >= 0:
            done[span.unit] = max(done[span.unit], span.end_s)
    found, first = [], 0
    for unit in units:
        last = first + len(unit.pieces(costs.world))
        actions = [sum(of_chunks) for of_chunks in zip(*seconds[first:last], strict=True)]
        found.append(
            UnitPrediction(
                ready_s=_rounded(timeline.ready_s[first]),
                done_s=_rounded(max(done[first:last])),
                actions_s=tuple(map(_rounded, actions)),
            )
        )
        first = last
    memory = memory_of(units, costs, precision_of(trace))
    return StepPrediction(
        backward_end_s=_rounded(timeline.backward_end_s),
        synced_s=_rounded(timeline.synced_s),
        after_s=_rounded(trace.after_s),
        feedback_bytes=memory.feedback,
        buffer_bytes=memory.buffers,
        units=tuple(found),
    )


def _seconds_of_actions(timeline: Timeline) -> list[list[float]]:
    """How long each action of each unit or chunk was at work; they follow each other, so their starts give their order."""
    found: list[list[float]] = [[] for _ in timeline.ready_s]
    for span in sorted(timeline.spans, key=lambda span: (span.start_s, span.end_s)):
        if span.unit >= 0:
            found[span.unit].append(span.end_s - span.start_s)
    return found


def _rounded(seconds: float) -> float:
    return round(seconds, _DIGITS)
