"""A recorded step as a timeline, so that what is drawn or written of the prediction can be of the measurement too.

Times count from the synchronisation of the step before; `since_last_step` turns a predicted timeline to that axis.

A routine is recorded from its issue to its completion. Several may be under way on one link: as in the model, the link then
serves the one that was issued first, and the others count from its end. So the links' seconds add up to the time in which they
were busy. What a routine waits for slower ranks is in its seconds, which the model knows nothing of.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from ..core.option import Device, Level, Option
from ..core.run_trace import Mark, RunSpan, RunStep, RunTrace
from .cost import LINKS, Resource
from .timeline import Span, Timeline

COPIES = {Mark.COPY_IN: "copy in", Mark.COPY_OUT: "copy out"}


class Work(NamedTuple):
    """An action at work on its resource, or a copy; seconds since the last step. Numbers as in `RunSpan`."""

    unit: int
    action: int
    resource: Resource
    start_s: float
    end_s: float


def at_work(run: RunTrace, step: RunStep) -> list[Work]:
    """All work of a step, by start."""
    options = [Option.parse(unit.option) for unit in run.units]
    found, busy_until = [], dict.fromkeys(LINKS, 0.0)
    for span in sorted(step.spans, key=lambda span: (span.start_s, span.end_s)):
        if span.action < 0 and span.action not in COPIES:
            continue
        at = Device.CPU if run.device == "cpu" else Device.GPU
        resource = resource_of(at if span.action < 0 else options[span.unit].actions[span.action].at, run.nodes)
        start = span.start_s
        if resource in busy_until:
            start = min(max(start, busy_until[resource]), span.end_s)
            busy_until[resource] = max(busy_until[resource], span.end_s)
        found.append(Work(span.unit, span.action, resource, start, span.end_s))
    return found


def resource_of(at: Device | Level, nodes: int) -> Resource:
    """What an action at a place occupies. Flat routines occupy the link between nodes, where there are several."""
    if isinstance(at, Device):
        return Resource.CPU if at is Device.CPU else Resource.COMPUTE
    return Resource.INTRA if at is Level.INTRA or nodes == 1 else Resource.INTER


def moments(run: RunTrace, step: RunStep, mark: Mark) -> list[float | None]:
    """When each of the run's units reached a mark; None where that was not recorded."""
    found: list[float | None] = [None] * len(run.units)
    for span in step.spans:
        if span.action == mark:
            found[span.unit] = span.end_s
    return found


def median_step(run: RunTrace) -> RunStep:
    """The step whose length is the median, the longer one of two."""
    length = statistics.median_high(step.seconds for step in run.steps)
    return next(step for step in run.steps if step.seconds == length)


def measured_timeline(run: RunTrace, step: RunStep) -> Timeline:
    """A recorded step, with its routines from when the link served them."""
    actions = [[str(action) for action in Option.parse(unit.option).actions] for unit in run.units]
    flush = step.whole(Mark.FLUSH)
    spans = [
        Span(resource, start, end, unit, run.units[unit].label, actions[unit][action] if action >= 0 else COPIES[Mark(action)])
        for unit, action, resource, start, end in at_work(run, step)
    ]
    model = partial(Span, Resource.COMPUTE, unit=-1, name="")
    backward = backward_of(step)
    if backward is None:
        spans.append(model(start_s=0.0, end_s=flush.start_s, action="model"))
    else:
        spans.append(model(start_s=0.0, end_s=backward.start_s, action="forward"))
        spans.append(model(start_s=backward.start_s, end_s=backward.end_s, action="backward"))
    spans.sort(key=lambda span: (span.resource, span.start_s))
    ready = tuple(time for time in moments(run, step, Mark.READY) if time is not None)
    return Timeline(tuple(spans), flush.start_s, flush.end_s, flush.end_s, ready)


def backward_of(step: RunStep) -> RunSpan | None:
    """The backward whose gradients were synchronised; None where its start is not known."""
    return next((span for span in step.spans if span.action == Mark.BACKWARD), None)


def since_last_step(timeline: Timeline) -> Timeline:
    """A predicted timeline that starts with the optimizer of the step before, and ends when the gradients are synchronised."""
    after = timeline.iteration_s - timeline.synced_s
    turned = [
        replace(span, start_s=0.0, end_s=after)
        if span.action == "optimizer" and span.unit < 0
        else replace(span, start_s=span.start_s + after, end_s=span.end_s + after)
        for span in timeline.spans
    ]
    return Timeline(
        tuple(sorted(turned, key=lambda span: (span.resource, span.start_s))),
        timeline.backward_end_s + after,
        timeline.iteration_s,
        timeline.iteration_s,
        tuple(time + after for time in timeline.ready_s),
    )
