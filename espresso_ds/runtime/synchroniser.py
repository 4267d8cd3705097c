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
    """Synchronises the gradients of one engine, unit by unit, in the order of `units` on every rank."""

    def __init__(
        self,
        units: Sequence[tuple[Unit, list[Member]]],
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
            while len(self._jobs) < len(self._units) and self._missing[len(self._jobs)] == 0:
                self._submit(len(self._jobs))

    def flush(self) -> None:
        """Submit what is left (a parameter without a gradient counts as zeros), wait for all, and get ready for the next step."""
        with self._lock:
            for number in range(len(self._jobs), len(self._units)):
                self._submit(number)
            jobs, self._jobs = self._jobs, []
            self._missing = [len(members) for _, members in self._units]
            for member in self._member.values():
                member.seen = 0
            self.step += 1
        self._lanes.wait(jobs)
        streams.join(self._units[0][1][0].param.device)

    def _submit(self, number: int) -> None:
        unit, members = self._units[number]
        grads = [_gradient(member.param) for member in members]
        mark = streams.mark(members[0].param.device)
        self._jobs.append(self._lanes.submit(unit.label, self._steps(number, unit, grads, mark, self.step)))

    def _steps(self, number: int, unit: Unit, grads: list[Tensor], mark: object, step: int) -> Steps:
        """Gradients into the unit's buffer, the option's actions, the buffer into the gradients."""
        streams.wait(mark)
        x = self._buffer(number, unit, grads)
        parts = x[: unit.numel].split([grad.numel() for grad in grads])
        for part, grad in zip(parts, grads, strict=True):
            if part.data_ptr() != grad.data_ptr():
                part.copy_(grad.reshape(-1))
        x[unit.numel :].zero_()
        if self._scaling.before != 1.0:
            x.mul_(self._scaling.before)
        yield from self._executor.run(unit, x, step)
        if self._scaling.after != 1.0:
            x.mul_(self._scaling.after)
        for part, grad in zip(parts, grads, strict=True):
            if part.data_ptr() != grad.data_ptr():
                grad.copy_(part.view(grad.shape))

    def _buffer(self, number: int, unit: Unit, grads: list[Tensor]) -> Tensor:
        """The flat buffer: the gradient itself where it can serve, else one that is kept for the unit."""
        dtype = torch.float32 if unit.option.compresses else self._wire_dtype
        numel = self._executor.buffer_numel(unit)
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
