"""Gradients become ready in any order and leave in the plan's: the glue between backward hooks and lanes.

`ready` is called for each gradient as backward completes it; a unit is submitted once all its gradients are ready and all units
before it have been submitted. `flush`, after backward, submits the rest and waits: then every `param.grad` holds the result.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import SyncError
from . import streams
from .executor import Executor, Unit
from .lanes import Job, Lanes, Steps


@dataclass(frozen=True)
class Scaling:
    """Factors on a gradient before and after the sum over ranks; their product is 1/world for a mean, 1 for a sum."""

    before: float
    after: float


@dataclass
class Member:
    """A parameter of a unit. `firings`: how often its hook fires before its gradient is complete."""

    name: str
    param: torch.nn.Parameter
    firings: int = 1
    seen: int = 0


class Synchroniser:
    """Synchronises the gradients of one engine, unit by unit, in the order of `units` on every rank.

    Args:
        units: each as its chunks (one for most) and its parameters, whose gradients follow each other in the unit's buffer.
        executor: runs the chunks' options.
        lanes: where they run.
        scaling: applied around the sum over ranks.
        wire_dtype: of what is sent uncompressed.
    """

    def __init__(
        self,
        units: Sequence[tuple[list[Unit], list[Member]]],
        executor: Executor,
        lanes: Lanes,
        scaling: Scaling,
        wire_dtype: torch.dtype,
    ) -> None:
        self._units = units
        self._executor = executor
        self._lanes = lanes
        self._scaling = scaling
        self._wire_dtype = wire_dtype
        self._unit_of = {member.name: number for number, (_, members) in enumerate(units) for member in members}
        self._member = {member.name: member for _, members in units for member in members}
        self._missing = [len(members) for _, members in units]
        self._submitted = 0
        self._jobs: list[Job] = []
        self._buffers: dict[int, Tensor] = {}
        self._lock = threading.Lock()
        self.step = 0

    @property
    def buffer_nbytes(self) -> int:
        """Bytes of the buffers that units keep between steps (fused units, casts, padding)."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def ready(self, name: str) -> None:
        """Note that a gradient is complete, and submit the units that now can go.

        Raises:
            SyncError: the hook fires again after its unit has left; the plan holds for another model or schedule.
        """
        member = self._member[name]
        with self._lock:
            member.seen += 1
            if member.seen < member.firings:
                return
            if member.seen > member.firings:
                raise SyncError(
                    f"{name}: its gradient was completed {member.seen} times in one backward, the plan says {member.firings}; "
                    "trace the model again with `espresso trace` (activation checkpointing has changed since)"
                )
            self._missing[self._unit_of[name]] -= 1
            while self._submitted < len(self._units) and self._missing[self._submitted] == 0:
                self._submit_next()

    def flush(self) -> None:
        """Submit what is left (a parameter without a gradient counts as zeros), wait for all, and get ready for the next step."""
        with self._lock:
            while self._submitted < len(self._units):
                self._submit_next()
            jobs, self._jobs, self._submitted = self._jobs, [], 0
            self._missing = [len(members) for _, members in self._units]
            for member in self._member.values():
                member.seen = 0
            self.step += 1
        self._lanes.wait(jobs)
        streams.join(self._units[0][1][0].param.device)

    def _submit_next(self) -> None:
        number = self._submitted
        chunks, members = self._units[number]
        grads = [_gradient(member.param) for member in members]
        mark = streams.mark(members[0].param.device)
        for place, chunk in enumerate(chunks):
            self._jobs.append(self._lanes.submit(chunk.label, self._steps(number, place, grads, mark, self.step)))
        self._submitted += 1

    def _steps(self, number: int, place: int, grads: list[Tensor], mark: object, step: int) -> Steps:
        """One chunk: the first brings the gradients into the unit's buffer, the last takes them back; lanes keep their order."""
        chunks, _ = self._units[number]
        chunk, numel = chunks[place], sum(chunk.numel for chunk in chunks)
        streams.wait(mark)
        buffer = self._buffer(number, chunks, grads)
        parts = buffer[:numel].split([grad.numel() for grad in grads])
        elsewhere = [(part, grad) for part, grad in zip(parts, grads, strict=True) if part.data_ptr() != grad.data_ptr()]
        if place == 0:
            for part, grad in elsewhere:
                part.copy_(grad.reshape(-1))
            buffer[numel:].zero_()
        start = sum(before.numel for before in chunks[:place])
        x = buffer[start : start + self._executor.buffer_numel(chunk)]
        if self._scaling.before != 1.0:
            x.mul_(self._scaling.before)
        yield from self._executor.run(chunk, x, step)
        if self._scaling.after != 1.0:
            x.mul_(self._scaling.after)
        if chunk is chunks[-1]:
            for part, grad in elsewhere:
                grad.copy_(part.view(grad.shape))

    def _buffer(self, number: int, chunks: list[Unit], grads: list[Tensor]) -> Tensor:
        """The flat buffer: the gradient itself where it can serve, else one that is kept for the unit."""
        dtype = torch.float32 if chunks[0].option.compresses else self._wire_dtype
        numel = sum(map(self._executor.buffer_numel, chunks))  # all chunks but the last have whole shards: no padding
        if len(grads) == 1 and grads[0].dtype == dtype and grads[0].is_contiguous() and numel == grads[0].numel():
            return grads[0].view(-1)
        if number not in self._buffers:
            self._buffers[number] = torch.empty(numel, dtype=dtype, device=grads[0].device)
        return self._buffers[number]


def _gradient(param: torch.nn.Parameter) -> Tensor:
    """The parameter's gradient; zeros, kept as its gradient, where it has none."""
    if param.grad is None:
        param.grad = torch.zeros_like(param)
    return param.grad
