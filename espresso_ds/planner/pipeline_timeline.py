"""One step of a pipeline of stages: who computes when, and what crosses when (1F1B, as DeepSpeed's TrainSchedule has it).

`overlapped` is the runtime's: activations and gradients leave when they are there; on each boundary and in each direction a
thread encodes one message after the other, the stage's network card sends one at a time, and a thread of the other side decodes.
`blocking` is DeepSpeed's own: a stage sends or receives with all else waiting, and both sides of a message are there for it.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Pass = tuple[Literal["F", "B"], int]
"""Forward or backward of a micro-batch."""


class StageTimes(NamedTuple):
    """Seconds of one stage: of a micro-batch forward and backward, and of what follows all of them (optimizer)."""

    forward_s: float
    backward_s: float
    after_s: float = 0.0


class Message(NamedTuple):
    """What crosses a boundary in one direction for a micro-batch: seconds of codec work on both sides, bytes on the wire."""

    nbytes: float
    encode_s: float = 0.0
    decode_s: float = 0.0


class Boundary(NamedTuple):
    """Activations forward, their gradients backward, and the link: seconds of a message of no bytes, and of each byte."""

    forward: Message
    backward: Message
    alpha_s: float
    beta_s_per_byte: float

    def transfer_s(self, message: Message) -> float:
        """Seconds of a message on the link."""
        return self.alpha_s + self.beta_s_per_byte * message.nbytes


class Played(NamedTuple):
    """A step: its seconds, and for each stage when its last backward began and ended."""

    step_s: float
    last_backward: tuple[tuple[float, float], ...]


def order(stage: int, stages: int, micro_batches: int) -> list[Pass]:
    """The passes of a stage: as many forward as there are stages from here on, then one backward and one forward in turn."""
    ahead = min(stages - stage, micro_batches)
    passes: list[Pass] = [("F", m) for m in range(ahead)]
    for m in range(micro_batches):
        passes.append(("B", m))
        if ahead + m < micro_batches:
            passes.append(("F", ahead + m))
    return passes


def overlapped(
    stages: Sequence[StageTimes],
    boundaries: Sequence[Boundary],
    micro_batches: int,
    *,
    contention: float = 0.0,
    handling_s: float = 0.0,
    synchronised_s: Sequence[float] = (),
) -> Played:
    """A step with the runtime's channels.

    Args:
        stages: their times.
        boundaries: one fewer.
        micro_batches: of a step.
        contention: seconds by which a second of codec work delays the passes of its stage.
        handling_s: what each message takes whatever its size, in threads and calls: half of it delays a pass on each side, and
            all of it passes until the tensor is there.
        synchronised_s: for each stage the seconds from its last backward until its gradients are synchronised; default: none.
    """
    return _Play(stages, boundaries, micro_batches, contention, handling_s, synchronised_s).run()


def blocking(stages: Sequence[StageTimes], boundaries: Sequence[Boundary], micro_batches: int) -> Played:
    """A step with blocking sends and receives in DeepSpeed's order; codec work is the stage's own."""
    count = len(stages)
    work = [deque(instructions(stage, count, micro_batches)) for stage in range(count)]
    now, begun = [0.0] * count, [0.0] * count
    while any(work):
        moved = False
        for stage in range(count):
            while work[stage]:
                kind, m = work[stage][0]
                if kind in ("F", "B"):
                    begun[stage] = now[stage] if kind == "B" else begun[stage]
                    now[stage] += stages[stage].forward_s if kind == "F" else stages[stage].backward_s
                elif kind in ("send F", "recv B") and work[stage + 1] and work[stage + 1][0] == (_MATE[kind], m):
                    _meet(now, stage, stage + 1, boundaries[stage], kind)
                    work[stage + 1].popleft()
                elif kind in ("send B", "recv F") and work[stage - 1] and work[stage - 1][0] == (_MATE[kind], m):
                    _meet(now, stage, stage - 1, boundaries[stage - 1], kind)
                    work[stage - 1].popleft()
                else:
                    break
                work[stage].popleft()
                moved = True
        assert moved, "a schedule whose stages wait for each other in a circle"
    ends = [end + stage.after_s for end, stage in zip(now, stages, strict=True)]
    return Played(max(ends), tuple((start, end) for start, end in zip(begun, now, strict=True)))


_MATE = {"send F": "recv F", "recv F": "send F", "send B": "recv B", "recv B": "send B"}


def _meet(now: list[float], one: int, other: int, boundary: Boundary, kind: str) -> None:
    message = boundary.forward if kind[-1] == "F" else boundary.backward
    end = max(now[one], now[other]) + message.encode_s + boundary.transfer_s(message) + message.decode_s
    now[one] = now[other] = end


def instructions(stage: int, stages: int, micro_batches: int) -> list[tuple[str, int]]:
    """Passes with DeepSpeed's messages: gradients leave at once, activations too, unless gradients come next: then after them."""
    found: list[tuple[str, int]] = []
    held: int | None = None
    for kind, m in order(stage, stages, micro_batches):
        if kind == "F":
            found += [("recv F", m)] * (stage > 0) + [(kind, m)]
            if stage < stages - 1:
                if m + stage + 1 >= stages:
                    held = m
                else:
                    found.append(("send F", m))
        else:
            if stage < stages - 1:
                found += [("recv B", m)] + ([] if held is None else [("send F", held)])
                held = None
            found += [(kind, m)] + [("send B", m)] * (stage > 0)
    return found


@dataclass
class _Server:
    """Serves one job at a time, first come, first served."""

    free: bool = True
    waiting: deque[tuple[float, Callable[[], None]]] = field(default_factory=deque)


class _Play:
    """Events in the order of their times."""

    def __init__(
        self,
        stages: Sequence[StageTimes],
        boundaries: Sequence[Boundary],
        micro_batches: int,
        contention: float,
        handling_s: float,
        synchronised_s: Sequence[float],
    ) -> None:
        count = len(stages)
        self._stages, self._boundaries, self._last = stages, boundaries, micro_batches - 1
        self._synchronised = synchronised_s or [0.0] * count
        self._passes = [deque(order(stage, count, micro_batches)) for stage in range(count)]
        self._there: set[tuple[int, Pass]] = {(0, ("F", m)) for m in range(micro_batches)}
        self._there |= {(count - 1, ("B", m)) for m in range(micro_batches)}
        self._busy = [False] * count
        self._encoders = [{kind: _Server() for kind in "FB"} for _ in stages]
        self._cards = [_Server() for _ in stages]
        self._decoders = [{kind: _Server() for kind in "FB"} for _ in stages]
        self._handling_s = handling_s
        sides = [min(stage, 1) + min(count - 1 - stage, 1) for stage in range(count)]
        self._delay = [(contention * self._codec_s(stage) + handling_s * sides[stage]) / 2 for stage in range(count)]
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self._now = 0.0
        self._ends = [(0.0, 0.0)] * count

    def run(self) -> Played:
        for stage in range(len(self._stages)):
            self._go_on(stage)
        while self._events:
            self._now, _, happen = heapq.heappop(self._events)
            happen()
        each = zip(self._ends, self._synchronised, self._stages, strict=True)
        return Played(max(end + wait + stage.after_s for (_, end), wait, stage in each), tuple(self._ends))

    def _codec_s(self, stage: int) -> float:
        """Codec work beside the two passes of a micro-batch."""
        before, after = self._boundaries[:stage][-1:], self._boundaries[stage : stage + 1]
        sides = [each.forward.decode_s + each.backward.encode_s for each in before]
        return sum(sides) + sum(each.forward.encode_s + each.backward.decode_s for each in after)

    def _after(self, seconds: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._now + seconds, next(self._number), happen))

    def _go_on(self, stage: int) -> None:
        passes = self._passes[stage]
        if self._busy[stage] or not passes or (stage, passes[0]) not in self._there:
            return
        kind, m = passes.popleft()
        self._busy[stage] = True
        times = self._stages[stage]
        begun = self._now

        def done() -> None:
            self._busy[stage] = False
            if kind == "F" and stage < len(self._stages) - 1:
                self._cross(stage, stage + 1, self._boundaries[stage], self._boundaries[stage].forward, (kind, m))
            elif kind == "B" and stage > 0:
                self._cross(stage, stage - 1, self._boundaries[stage - 1], self._boundaries[stage - 1].backward, (kind, m))
            if kind == "B" and m == self._last:
                self._ends[stage] = begun, self._now
            self._go_on(stage)

        self._after((times.forward_s if kind == "F" else times.backward_s) + self._delay[stage], done)

    def _cross(self, sender: int, receiver: int, boundary: Boundary, message: Message, what: Pass) -> None:
        def arrive() -> None:
            self._there.add((receiver, what))
            self._go_on(receiver)

        def decode() -> None:
            self._serve(self._decoders[receiver][what[0]], message.decode_s, lambda: self._after(self._handling_s, arrive))

        def send() -> None:
            self._serve(self._cards[sender], boundary.transfer_s(message), decode)

        self._serve(self._encoders[sender][what[0]], message.encode_s, send)

    def _serve(self, server: _Server, seconds: float, then: Callable[[], None]) -> None:
        if not server.free:
            server.waiting.append((seconds, then))
            return
        server.free = False

        def done() -> None:
            server.free = True
            if server.waiting:
                self._serve(server, *server.waiting.popleft())
            then()

        self._after(seconds, done)
