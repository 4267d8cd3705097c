"""The recorder: every action of the runtime is a span, always on.

Each thread writes into a ring of its own, so that nothing is locked; a record is five numbers put into memory that was taken at
the start. The last steps can be read at any time, best between steps, and become a `RunTrace` file.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import struct
import time
from collections.abc import Sequence, Set
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..core.errors import FileError
from ..core.plan import Plan
from ..core.run_trace import NO_UNIT, TRACE_ENV, Mark, RunSpan, RunStep, RunTrace, RunUnit, run_units

_RECORD = struct.Struct("=iiiqq")
_DTYPE = np.dtype([("step", "i4"), ("unit", "i4"), ("action", "i4"), ("start", "i8"), ("end", "i8")])
_NBYTES = _RECORD.size
_PER_UNIT = 6
"""Most records of one writer for one unit in one step: a routine, D, C and the marks around them."""
_MOST = 2**17
"""Records of one ring; with very many units fewer steps are kept."""


class Writer:
    """One thread's ring. No two threads may use the same one at a time."""

    __slots__ = ("_capacity", "_memory", "_pack", "_written")

    def __init__(self, capacity: int) -> None:
        self._memory = bytearray(capacity * _NBYTES)
        self._capacity = capacity
        self._pack = _RECORD.pack_into
        self._written = 0

    def span(self, step: int, unit: int, action: int, start_ns: int, end_ns: int) -> None:
        """Record that an action took from `start_ns` to `end_ns`, both of `time.perf_counter_ns`.

        Args:
            step: counts optimizer steps.
            unit: counts what travels as one buffer, chunks one by one, in plan order.
            action: counts the actions of the unit's option.
            start_ns: for a routine, when it was issued.
            end_ns: for a routine, when it was seen complete.
        """
        written = self._written
        self._pack(self._memory, written % self._capacity * _NBYTES, step, unit, action, start_ns, end_ns)
        self._written = written + 1  # last: a reader then never takes a record that is not there

    def mark(self, mark: Mark, step: int, unit: int = NO_UNIT, start_ns: int | None = None) -> None:
        """Record a mark that ends now; a moment, or a span where `start_ns` is given."""
        now = time.perf_counter_ns()
        self.span(step, unit, mark, now if start_ns is None else start_ns, now)

    @property
    def nbytes(self) -> int:
        """Bytes of the ring."""
        return len(self._memory)

    def read(self) -> tuple[NDArray[np.void], int]:
        """The records that are there, oldest first, and the first step that none of them can be missing of."""
        before = self._written
        records = np.frombuffer(bytes(self._memory), _DTYPE)
        after = self._written
        first = max(0, after - self._capacity + 1)  # the writer may just be at the oldest one
        kept = records[np.arange(min(first, before), before) % self._capacity]
        return kept, 0 if first == 0 or not len(kept) else int(kept["step"][0]) + 1


class Recorder:
    """The spans of the last steps.

    Args:
        lanes: number of lane threads.
        units: what travels as one buffer, chunks one by one.
        steps: whole steps that are kept, as long as a ring of 2^17 records holds them.
    """

    def __init__(self, lanes: int, units: int, steps: int = 16) -> None:
        self._steps = steps
        capacity = min((steps + 1) * (units * _PER_UNIT + len(Mark)), _MOST)
        self.training = Writer(capacity)
        """For backward hooks and the flush, which never run at the same time."""
        self._lanes = [Writer(capacity) for _ in range(lanes)]
        self._rings = (self.training, *self._lanes)

    def lane(self, number: int) -> Writer:
        """The ring of one lane's thread."""
        return self._lanes[number]

    @property
    def nbytes(self) -> int:
        """Bytes of all rings."""
        return sum(ring.nbytes for ring in self._rings)

    def stop(self) -> None:
        """Keep what is recorded, and take no more; between steps."""
        self.training, self._lanes = Writer(1), [Writer(1) for _ in self._lanes]  # which nobody reads

    def steps(self) -> tuple[RunStep, ...]:
        """The last whole steps, oldest first; none before the second flush, since the first only sets the clock."""
        parts, complete = zip(*(ring.read() for ring in self._rings), strict=True)
        records = np.concatenate(parts)
        records = records[np.argsort(records["end"], kind="stable")]
        ends = {int(r["step"]): int(r["end"]) for r in records[records["action"] == Mark.FLUSH]}
        whole = [step for step in sorted(ends) if step >= max(complete) and step - 1 in ends][-self._steps :]
        return tuple(_step(step, records[records["step"] == step], ends[step - 1]) for step in whole)


def _step(step: int, records: NDArray[np.void], zero_ns: int) -> RunStep:
    seconds = [((records[key] - zero_ns) * 1e-9).round(9).tolist() for key in ("start", "end")]
    columns = records["unit"].tolist(), records["action"].tolist(), *seconds
    return RunStep(step=step, spans=tuple(map(RunSpan, *columns)))


def holds_s(recorder: Recorder, units: Sequence[RunUnit], steps: Set[int]) -> list[float]:
    """For how long each unit of the plan held up those behind it: from when it was ready and all before it were done until it was
    done itself. The median over the given steps; -1 where none of them is recorded any more.

    Args:
        recorder: of this rank.
        units: what it counts, in the order on the wire.
        steps: by their number in the run.
    """
    count = units[-1].unit + 1
    of_steps = [_holds_s(step, units, count) for step in recorder.steps() if step.step in steps]
    return [statistics.median(of_unit) for of_unit in zip(*of_steps, strict=True)] if of_steps else [-1.0] * count


def _holds_s(step: RunStep, units: Sequence[RunUnit], count: int) -> list[float]:
    submitted, done = [math.inf] * count, [0.0] * count
    for span in step.spans:
        if span.action == Mark.SUBMITTED:
            submitted[units[span.unit].unit] = min(submitted[units[span.unit].unit], span.end_s)
        elif span.action == Mark.DONE:
            done[units[span.unit].unit] = max(done[units[span.unit].unit], span.end_s)
    before = itertools.accumulate(done, max, initial=0.0)
    return [max(0.0, end - max(start, free)) for start, end, free in zip(submitted, done, before, strict=False)]


def run_trace(
    recorder: Recorder, plan: Plan, *, rank: int, device: str, made_by: str, off_plan: Set[int] = frozenset()
) -> RunTrace:
    """What was recorded under `plan` on this rank, as a file to be.

    Args:
        recorder: of this rank.
        plan: what ran.
        rank: this one.
        device: where the model computes, cpu or cuda.
        made_by: version of the program.
        off_plan: steps that are left out, since not all was sent as planned in them.
    """
    made_for = plan.made_for
    return RunTrace(
        made_by=made_by,
        plan=plan.seal,
        rank=rank,
        world_size=made_for.world_size,
        nodes=made_for.nodes,
        device=device,
        units=run_units(plan),
        steps=tuple(step for step in recorder.steps() if step.step not in off_plan),
    )


def wanted_path(rank: int) -> Path | None:
    """Where this rank's run trace shall go, by `ESPRESSO_TRACE_RUN`; None where nobody asked for it.

    Rank 0 writes, or every rank where the name holds `{rank}`.

    Raises:
        FileError: there is no directory for it.
    """
    name = os.environ.get(TRACE_ENV)
    if not name or (rank != 0 and "{rank}" not in name):
        return None
    path = Path(name.replace("{rank}", str(rank))).absolute()  # the script may change its directory
    if path.is_dir() or not path.parent.is_dir():
        raise FileError(f"{TRACE_ENV}={name}: there is no directory {path.parent}, or {path} is one; name a file in a directory")
    return path
