"""The iteration as a timeline of compute, CPU and links: when every unit is ready, compressed, sent and done (E 4.3).

A unit is a run of tensors that follow each other in the trace and travel as one buffer; it is ready when its last tensor is. Its
actions are split at its routines. Lane k does the codec work that comes before the k-th routine and then issues that routine;
after the last routine one more lane decompresses:

    lane 0   C a, issue A2A a | C b, issue A2A b | ...
    lane 1                    | D C a, issue AG a | D C b, issue AG b | ...
    lane 2                                        | D a               | D b | ...

A lane takes units in plan order and serves one at a time: the next only when the last has issued (or is done). Units are handed
on in plan order too: none enters lane k + 1 before the k-th routines of all earlier units are complete. That is how the runtime
keeps the order of collectives the same on all ranks. All lanes share the two links and the CPU, which serve whoever asks first,
the earlier unit where two ask at once.

Codec work slows the backward down. On the tensor's own GPU the backward stands still meanwhile (the paper's GPU compression; work
that arrives within the backward of a tensor is served at once and not after it). On the CPU both share the cores: while they run
together each proceeds at 1 / (1 + contention) of its speed, so that a second of codec work delays the backward by `contention`
seconds (1: they take turns on one core) and takes as much longer itself. A busy link slows the backward in the same way by the
cluster's own contention, since the network stack needs cores too, and each routine costs it some time of its own, whatever its
size: hooks, threads that wake each other, calls. Once the backward has ended nothing is delayed.

    F(S) = forward + max(end of backward, end of the last synchronisation) + after

`play` plays the units, `simulate` makes spans of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..core.chunks import chunk_lengths
from ..core.errors import FileError
from ..core.option import UNCOMPRESSED, Level, Option, Task
from ..core.profile import ModelTrace
from .cost import LINKS, Costs, Resource
from .play import play

STOCK_BUCKET_NUMEL = 500_000_000
"""DeepSpeed's bucket: gradients are gathered until they have more elements than this, then reduced as one buffer."""


@dataclass(frozen=True, slots=True)
class Unit:
    """The tensors `trace.tensors[start:stop]` as one buffer.

    Elements, seconds from start of backward until ready, option, which codec it uses where it compresses, and then the elements
    of its chunks, if it travels in chunks.
    """

    start: int
    stop: int
    numel: int
    dtype: str
    ready_s: float
    option: Option
    codec: int = 0
    chunk_numel: int | None = None

    @classmethod
    def of(cls, trace: ModelTrace, start: int, stop: int, option: Option = UNCOMPRESSED, codec: int = 0) -> Unit:
        """The unit of `trace.tensors[start:stop]`, which must have one dtype (FileError otherwise)."""
        tensors = trace.tensors[start:stop]
        if odd := next((t for t in tensors if t.dtype != tensors[0].dtype), None):
            raise FileError(
                f"tensors {tensors[0].name!r} ({tensors[0].dtype}) and {odd.name!r} ({odd.dtype}) cannot share a unit"
            )
        numel, ready_s = sum(t.numel for t in tensors), max(t.ready_s for t in tensors)
        return cls(start, stop, numel, tensors[0].dtype, ready_s, option, codec)

    def pieces(self, world_size: int) -> list[Unit]:
        """What it travels as: itself, or a unit for each of its chunks."""
        if self.chunk_numel is None:
            return [self]
        if not self.option.compresses:
            return [replace(self, chunk_numel=None)]
        lengths = chunk_lengths(self.numel, self.chunk_numel, world_size)
        return [replace(self, numel=length, chunk_numel=None) for length in lengths]

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
    ready_s: tuple[float, ...] = ()
    """When the gradients of each unit or chunk were complete, in plan order."""

    @property
    def exposed_s(self) -> float:
        """Seconds after the end of backward in which the optimizer waits for synchronisation."""
        return self.synced_s - self.backward_end_s

    @cached_property
    def bubbles(self) -> tuple[tuple[float, float], ...]:
        """Gaps (start, end) before the last routine in which no link is busy and no codec works: all wait for the backward.

        The paper's bubbles are gaps on the link. A gap in which something is being compressed is left out: there the next
        routine waits for a codec and not only for the backward, so that earlier work may matter.
        """
        work = sorted((s.start_s, s.end_s) for s in self.spans if s.unit >= 0)
        last = max((s.start_s for s in self.spans if s.resource in LINKS), default=0.0)
        gaps, busy_until = [], work[0][1] if work else 0.0
        for start, end in work:
            if busy_until < start <= last:
                gaps.append((busy_until, start))
            busy_until = max(busy_until, end)
        return tuple(gaps)

    @cached_property
    def critical_path(self) -> tuple[Span, ...]:
        """The spans that the step's end waits for, first to last: each begins when the one before it ends.

        Of several that end together, the one of the same unit comes first, then the one that held the resource, then the
        model's own compute. What starts because a gradient became ready is preceded by backward.
        """
        path = [max((s for s in self.spans if s.unit >= 0 or s.action == "optimizer"), key=lambda s: (s.end_s, s.unit < 0))]
        while True:
            now = path[-1]
            before = [s for s in self.spans if s.end_s == now.start_s > s.start_s]
            under_way = [s for s in self.spans if s.unit < 0 and s.start_s < now.start_s < s.end_s]
            if before:
                path.append(min(before, key=lambda s: (s.unit != now.unit, s.resource != now.resource, s.unit)))
            elif under_way:
                path.append(replace(under_way[0], end_s=now.start_s))
            else:
                return tuple(reversed(path))

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
    units = [piece for unit in units for piece in unit.pieces(costs.world)]
    walks = [costs.walk(unit.option, unit.numel, unit.codec).lean for unit in units]
    ends = play(walks, [unit.ready_s for unit in units], trace.backward_s, *costs.delays)
    return trace.forward_s + max(ends) + trace.after_s


def simulate(units: Sequence[Unit], trace: ModelTrace, costs: Costs) -> Timeline:
    """The whole timeline of a step with these units, in plan order. Raises FileError (a cost was not measured)."""
    units = [piece for unit in units for piece in unit.pieces(costs.world)]
    walks = [costs.walk(unit.option, unit.numel, unit.codec) for unit in units]
    log: list[tuple[int, int, int, float, float]] = []
    became_ready: list[float] = []
    ready = [unit.ready_s for unit in units]
    lean = [walk.lean for walk in walks]
    backward_end, synced = play(lean, ready, trace.backward_s, *costs.delays, log, became_ready)
    names = [unit.name(trace) for unit in units]
    offset = trace.forward_s
    spans = [
        Span(Resource(resource), offset + start, offset + end, unit, names[unit], str(walks[unit].steps[step].action))
        for unit, step, resource, start, end in log
    ]
    synced = max(synced, backward_end)
    stopped = [(span.start_s, span.end_s) for span in spans if span.resource is Resource.COMPUTE]
    spans += _model_spans(trace, offset + backward_end, offset + synced, stopped)
    spans.sort(key=lambda span: (span.resource, span.start_s))
    ends = offset + backward_end, offset + synced, offset + synced + trace.after_s
    return Timeline(tuple(spans), *ends, tuple(offset + now for now in became_ready))


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
    link = Resource.INTER if costs.shape.nodes > 1 else Resource.INTRA
    reduce = Span(link, end, synced, 0, "all gradients", "AR.flat")
    return Timeline((*_model_spans(trace, end, synced, ()), reduce), end, synced, total)


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
