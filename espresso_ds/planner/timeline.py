"""The iteration as a timeline of compute, CPU and link: when every unit is ready, compressed, sent and done (E 4.3).

A unit is a run of tensors that follow each other in the trace and travel as one buffer; it is ready when its last tensor is. Its
actions are split at its routines. Lane k does the codec work that comes before the k-th routine and then issues that routine;
after the last routine one more lane decompresses:

    lane 0   C a, issue A2A a | C b, issue A2A b | ...
    lane 1                    | D C a, issue AG a | D C b, issue AG b | ...
    lane 2                                        | D a               | D b | ...

A lane takes units in plan order and serves one at a time: the next only when the last has issued (or is done). All lanes share
the link and the CPU, which serve whoever asks first, the earlier unit where two ask at once.

Codec work slows the backward down. On the tensor's own GPU the backward stands still meanwhile (the paper's GPU compression; work
that arrives within the backward of a tensor is served at once and not after it). On the CPU both share the cores: while they run
together each proceeds at 1 / (1 + contention) of its speed, so that a second of codec work delays the backward by `contention`
seconds (1: they take turns on one core) and takes as much longer itself. A busy link slows the backward in the same way by the
cluster's own contention, since the network stack needs cores too. Once the backward has ended nothing is delayed.

    F(S) = forward + max(end of backward, end of the last synchronisation) + after

`iteration_time` is F(S) alone, for the search; `simulate` also keeps the spans. Both run the same loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..core.errors import FileError
from ..core.option import UNCOMPRESSED, Level, Option, Task
from ..core.profile import ModelTrace
from .cost import Costs, Resource

STOCK_BUCKET_NUMEL = 500_000_000
"""DeepSpeed's bucket: gradients are gathered until they have more elements than this, then reduced as one buffer."""

_INF = float("inf")
_COMPUTE, _CPU, _LINK = map(int, (Resource.COMPUTE, Resource.CPU, Resource.LINK))
_Lean = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Unit:
    """The tensors `trace.tensors[start:stop]` as one buffer: elements, seconds from start of backward until ready, and option."""

    start: int
    stop: int
    numel: int
    dtype: str
    ready_s: float
    option: Option

    @classmethod
    def of(cls, trace: ModelTrace, start: int, stop: int, option: Option = UNCOMPRESSED) -> Unit:
        """The unit of `trace.tensors[start:stop]`, which must have one dtype (FileError otherwise)."""
        tensors = trace.tensors[start:stop]
        if odd := next((t for t in tensors if t.dtype != tensors[0].dtype), None):
            raise FileError(
                f"tensors {tensors[0].name!r} ({tensors[0].dtype}) and {odd.name!r} ({odd.dtype}) cannot share a unit"
            )
        return cls(start, stop, sum(t.numel for t in tensors), tensors[0].dtype, max(t.ready_s for t in tensors), option)

    def name(self, trace: ModelTrace) -> str:
        """Name of its first tensor, and how many more there are."""
        more = self.stop - self.start - 1
        return trace.tensors[self.start].name + (f" +{more}" if more else "")


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of work on one resource; seconds from the start of the step. `unit` is -1 for the model's own compute."""

    resource: Resource
    start_s: float
    end_s: float
    unit: int
    name: str
    action: str


@dataclass(frozen=True)
class Timeline:
    """One step of training. Spans are in the order in which they start on each resource."""

    spans: tuple[Span, ...]
    backward_end_s: float
    synced_s: float
    """End of the last synchronisation; the end of backward where that is later."""
    iteration_s: float

    @property
    def exposed_s(self) -> float:
        """Seconds after the end of backward in which the optimizer waits for synchronisation."""
        return self.synced_s - self.backward_end_s

    @cached_property
    def bubbles(self) -> tuple[tuple[float, float], ...]:
        """Gaps (start, end) before the last routine in which the link is idle and no codec works: all wait for the backward.

        The paper's bubbles are gaps on the link. A gap in which something is being compressed is left out: there the next
        routine waits for a codec and not only for the backward, so that earlier work may matter.
        """
        work = sorted((s.start_s, s.end_s) for s in self.spans if s.unit >= 0)
        last = max((s.start_s for s in self.spans if s.resource is Resource.LINK), default=0.0)
        gaps, busy_until = [], work[0][1] if work else 0.0
        for start, end in work:
            if busy_until < start <= last:
                gaps.append((busy_until, start))
            busy_until = max(busy_until, end)
        return tuple(gaps)

    @cached_property
    def hidden(self) -> frozenset[int]:
        """Units that are done before the last bubble: to send them faster only makes a bubble longer (E 4.4, Property 1)."""
        if not self.bubbles:
            return frozenset()
        until = self.bubbles[-1][0]
        late = {s.unit for s in self.spans if s.end_s > until}
        return frozenset({s.unit for s in self.spans if s.unit >= 0} - late)


def iteration_time(units: Sequence[Unit], trace: ModelTrace, costs: Costs) -> float:
    """F(S) in seconds: the step time with these units, in plan order. Raises FileError (a cost was not measured)."""
    walks = [costs.walk(unit.option, unit.numel).lean for unit in units]
    return step_time(walks, [unit.ready_s for unit in units], trace, costs)


def step_time(walks: Sequence[_Lean], ready_s: Sequence[float], trace: ModelTrace, costs: Costs) -> float:
    """F(S) of units given as (resource, seconds) steps and ready times: what the search calls thousands of times."""
    backward_end, synced = _run(walks, ready_s, trace.backward_s, costs.contention, costs.link_contention, None)
    return trace.forward_s + max(backward_end, synced) + trace.after_s


def simulate(units: Sequence[Unit], trace: ModelTrace, costs: Costs) -> Timeline:
    """The whole timeline of a step with these units, in plan order. Raises FileError (a cost was not measured)."""
    walks = [costs.walk(unit.option, unit.numel) for unit in units]
    log: list[tuple[int, int, float, float]] = []
    ready = [unit.ready_s for unit in units]
    backward_end, synced = _run(
        [walk.lean for walk in walks], ready, trace.backward_s, costs.contention, costs.link_contention, log
    )
    names = [unit.name(trace) for unit in units]
    offset, taken = trace.forward_s, [0] * len(units)
    spans = []
    for unit, resource, start, end in log:
        action = walks[unit].steps[taken[unit]].action
        taken[unit] += 1
        spans.append(Span(Resource(resource), offset + start, offset + end, unit, names[unit], str(action)))
    synced = max(synced, backward_end)
    stopped = [(span.start_s, span.end_s) for span in spans if span.resource is Resource.COMPUTE]
    spans += _model_spans(trace, offset + backward_end, offset + synced, stopped)
    spans.sort(key=lambda span: (span.resource, span.start_s))
    return Timeline(tuple(spans), offset + backward_end, offset + synced, offset + synced + trace.after_s)


def stock_time(trace: ModelTrace, costs: Costs) -> float:
    """Seconds of a step of DeepSpeed's stage 0 as it is: allreduces, bucket by bucket, after backward. Raises FileError."""
    buckets: dict[str, list[int]] = {}
    for tensor in trace.tensors:
        sizes = buckets.setdefault(tensor.dtype, [0])
        if sizes[-1] > STOCK_BUCKET_NUMEL:
            sizes.append(0)
        sizes[-1] += tensor.numel
    reduce_s = sum(
        costs.comm(Task.ALLREDUCE, Level.FLAT, numel * costs.element_bytes) for sizes in buckets.values() for numel in sizes
    )
    return trace.compute_s + reduce_s


def stock_timeline(trace: ModelTrace, costs: Costs) -> Timeline:
    """`stock_time` as a timeline, for pictures. Raises FileError."""
    end = trace.forward_s + trace.backward_s
    total = stock_time(trace, costs)
    synced = total - trace.after_s
    reduce = Span(Resource.LINK, end, synced, 0, "all gradients", "AR.flat")
    return Timeline((*_model_spans(trace, end, synced, ()), reduce), end, synced, total)


def to_chrome(timeline: Timeline) -> dict[str, Any]:
    """The timeline in the Trace Event Format, for chrome://tracing and Perfetto; microseconds."""
    names = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": int(resource), "args": {"name": resource.name.lower()}}
        for resource in Resource
    ]
    spans = [
        {
            "ph": "X",
            "name": f"{span.action} {span.name}".strip(),
            "cat": span.resource.name.lower(),
            "pid": 0,
            "tid": int(span.resource),
            "ts": span.start_s * 1e6,
            "dur": (span.end_s - span.start_s) * 1e6,
            "args": {"unit": span.unit, "tensor": span.name, "action": span.action},
        }
        for span in timeline.spans
    ]
    return {"displayTimeUnit": "ms", "traceEvents": names + spans}


def _model_spans(trace: ModelTrace, backward_end: float, synced: float, stopped: Iterable[tuple[float, float]]) -> list[Span]:
    """Forward, the pieces of backward between codec work on its own device, and the optimizer."""
    spans, start = [Span(Resource.COMPUTE, 0.0, trace.forward_s, -1, "", "forward")], trace.forward_s
    for stop, resume in sorted(stopped):
        if start < stop and start < backward_end:
            spans.append(Span(Resource.COMPUTE, start, min(stop, backward_end), -1, "", "backward"))
        start = max(start, resume)
    if start < backward_end:
        spans.append(Span(Resource.COMPUTE, start, backward_end, -1, "", "backward"))
    spans.append(Span(Resource.COMPUTE, synced, synced + trace.after_s, -1, "", "optimizer"))
    return spans


def _run(
    walks: Sequence[_Lean],
    ready_s: Sequence[float],
    backward_s: float,
    contention: float,
    link_contention: float,
    log: list[tuple[int, int, float, float]] | None,
) -> tuple[float, float]:
    """Play the units through lanes and resources, event by event; return the ends of backward and of the last synchronisation.

    Times count from the start of backward. The next event is the next unit becoming ready or one of the three resources
    finishing; the earlier unit goes first where two fall together. With `log`, each step is kept as (unit, resource, start, end).
    """
    count = len(walks)
    targets = [*ready_s, backward_s]  # how far backward must be; the last entry is its end
    upcoming = 0
    passed = 0.0  # progress of backward at `now`, in seconds of undisturbed backward
    rate = 1.0
    now = synced = backward_end = 0.0
    position = [0] * count
    lane_of = [0] * count
    lanes: list[deque[int]] = [deque() for _ in range(2 + max((len(walk) for walk in walks), default=0))]
    serving = [False] * len(lanes)
    queues: tuple[deque[int], ...] = (deque(), deque(), deque())
    at = [-1, -1, -1]  # the unit on each resource
    begun = [0.0, 0.0, 0.0]
    until = [_INF, _INF, _INF]
    shared = 1.0 + contention  # how much longer codec work on the CPU takes while backward runs, and backward beside it

    def request(unit: int) -> None:
        resource, seconds = walks[unit][position[unit]]
        if at[resource] >= 0:
            queues[resource].append(unit)
            return
        at[resource] = unit
        begun[resource] = now
        until[resource] = now + (seconds * shared if resource == _CPU and upcoming <= count else seconds)

    def serve(lane: int) -> None:
        """Let the lane take units until one occupies it with codec work."""
        queue = lanes[lane]
        while queue:
            unit = queue.popleft()
            request(unit)
            if walks[unit][position[unit]][0] != _LINK:
                serving[lane] = True
                return
        serving[lane] = False

    while True:
        # The next event. All of a later unit's events at the same time come after those of an earlier one.
        time, unit, source = _INF, count + 1, -1
        if upcoming <= count:
            wait = targets[upcoming] - passed
            if wait <= 0:
                time, unit = now, upcoming
            elif rate > 0:
                time, unit = now + wait / rate, upcoming
        for resource in (0, 1, 2):
            end = until[resource]
            if end < time or (end == time and end < _INF and at[resource] < unit):
                time, unit, source = end, at[resource], resource
        if unit > count:
            return backward_end, synced
        passed += (time - now) * rate
        now = time

        if source < 0:  # a unit is ready, or backward ends
            if upcoming == count:
                backward_end = now
                if at[_CPU] >= 0:
                    until[_CPU] = now + (until[_CPU] - now) / shared
            else:
                lanes[0].append(unit)
                if not serving[0]:
                    serve(0)
            upcoming += 1
        else:
            if log is not None:
                log.append((unit, source, begun[source], now))
            at[source], until[source] = -1, _INF
            if queues[source]:  # who waits came before whoever is about to ask
                request(queues[source].popleft())
            position[unit] += 1
            more = position[unit] < len(walks[unit])
            lane = lane_of[unit]
            if source == _LINK:
                if more:
                    lane_of[unit] = lane + 1
                    lanes[lane + 1].append(unit)
                    if not serving[lane + 1]:
                        serve(lane + 1)
            elif more and walks[unit][position[unit]][0] != _LINK:
                request(unit)  # the lane stays with the unit
            else:
                if more:
                    request(unit)
                serve(lane)
            if not more:
                synced = now
        if at[_COMPUTE] >= 0:
            rate = 0.0
        else:
            rate = 1.0 / (1.0 + (contention if at[_CPU] >= 0 else 0.0) + (link_contention if at[_LINK] >= 0 else 0.0))
