"""Gradients become ready in any order and leave in the plan's: the glue between backward hooks and lanes.

`ready` is called for each gradient as backward completes it; a unit is submitted once all its gradients are ready and all units
before it have been submitted. `flush`, after backward, submits the rest and waits: then every gradient is the result.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compressors.parts import Parts
from ..core.errors import SyncError
from ..core.run_trace import NO_UNIT, Mark
from . import streams
from .executor import Executor, Unit
from .lanes import Job, Lanes, Steps
from .trace import Recorder


@dataclass(frozen=True)
class Scaling:
    """Factors on a gradient before and after the sum over ranks; their product is 1/world for a mean, 1 for a sum."""

    before: float
    after: float

    def first(self) -> Scaling:
        """All of it before the sum: where a gradient is copied anyway, this takes no pass over memory of its own."""
        return Scaling(self.before * self.after, 1.0)


@dataclass
class Member:
    """A parameter of a unit.

    `firings`: how often its hook fires before its gradient is complete. `held`: the flat tensor in which its optimizer keeps the
    gradient and wants the sum, if that is not `param.grad`.
    """

    name: str
    param: torch.nn.Parameter
    firings: int = 1
    held: Tensor | None = None
    seen: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of the gradient."""
        return self.param.dtype if self.held is None else self.held.dtype

    def gradient(self) -> Tensor:
        """What this rank adds to the sum."""
        return gradient_of(self.param) if self.held is None else self.held


class Synchroniser:
    """Synchronises the gradients of one engine, unit by unit, in the order of `units` on every rank.

    Args:
        units: each as its chunks (one for most) and its parameters, whose gradients follow each other in the unit's buffer.
        executor: runs the chunks' options.
        lanes: where they run.
        scaling: applied around the sum over ranks.
        wire_dtype: of what is sent uncompressed.
        recorder: gets what happens around the actions of the options.
    """

    def __init__(
        self,
        units: Sequence[tuple[list[Unit], list[Member]]],
        executor: Executor,
        lanes: Lanes,
        scaling: Scaling,
        wire_dtype: torch.dtype,
        recorder: Recorder | None = None,
    ) -> None:
        self._units = units
        self._executor = executor
        self._lanes = lanes
        self._scaling = scaling
        self._wire_dtype = wire_dtype
        self._recorder = recorder
        self._unit_of = {member.name: number for number, (_, members) in enumerate(units) for member in members}
        self._member = {member.name: member for _, members in units for member in members}
        self._missing = [len(members) for _, members in units]
        self._submitted = 0
        self._jobs: list[Job] = []
        self._buffers = {number: self._new_buffer(number) for number in range(len(units)) if self._needs_buffer(number)}
        self._views = {number: self._views_of(number) for number in self._buffers if self._takes_gradients(number)}
        self._lock = threading.Lock()
        self._began_ns: int | None = None
        self.step = 0

    @property
    def buffer_nbytes(self) -> int:
        """Bytes of the buffers that units keep between steps (fused units, casts, padding)."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    @property
    def may_be_plain(self) -> frozenset[int]:
        """Numbers of the units that are planned to be compressed and may be sent uncompressed as well."""
        return frozenset(n for n, (chunks, _) in enumerate(self._units) if self._executor.may_send_plain(chunks[0]))

    def send_plain(self, numbers: Iterable[int]) -> None:
        """Send these units uncompressed from the next step on, the others as planned; between steps, alike on all ranks."""
        self._executor.send_plain(self._chunks(numbers))

    def settle_on(self, numbers: Iterable[int]) -> None:
        """Send these units uncompressed for good; between steps, alike on all ranks."""
        self._executor.settle_on(self._chunks(numbers))

    def begin(self) -> None:
        """Note that the backward pass starts whose gradients will be synchronised."""
        self._began_ns = time.perf_counter_ns()

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
            number = self._unit_of[name]
            self._missing[number] -= 1
            if self._recorder is not None and self._missing[number] == 0:
                self._recorder.training.mark(Mark.READY, self.step, self._units[number][0][0].index)
            while self._submitted < len(self._units) and self._missing[self._submitted] == 0:
                self._submit_next()

    def flush(self) -> None:
        """Submit what is left (a parameter without a gradient counts as zeros), wait for all, and get ready for the next step."""
        start_ns = time.perf_counter_ns()
        if self._recorder is not None and self._began_ns is not None:
            self._recorder.training.span(self.step, NO_UNIT, Mark.BACKWARD, self._began_ns, start_ns)
        self._began_ns = None
        with self._lock:
            while self._submitted < len(self._units):
                self._submit_next()
            jobs, self._jobs, self._submitted = self._jobs, [], 0
            self._missing = [len(members) for _, members in self._units]
            for member in self._member.values():
                member.seen = 0
            step, self.step = self.step, self.step + 1
        self._lanes.wait(jobs)
        streams.join(self._units[0][1][0].param.device)
        if self._recorder is not None:
            self._recorder.training.mark(Mark.FLUSH, step, start_ns=start_ns)

    def _chunks(self, numbers: Iterable[int]) -> list[Unit]:
        return [chunk for number in numbers for chunk in self._units[number][0]]

    def _submit_next(self) -> None:
        number = self._submitted
        chunks, members = self._units[number]
        grads = [member.gradient() for member in members]
        for member, view in zip(members, self._views.get(number, ()), strict=False):
            member.param.grad = view  # where the sum will be; backward's own gradient goes as soon as it is encoded
        mark = streams.mark(members[0].param.device)
        for place, chunk in enumerate(chunks):
            if self._recorder is not None:
                self._recorder.training.mark(Mark.SUBMITTED, self.step, chunk.index)
            self._jobs.append(self._lanes.submit(chunk.label, self._steps(number, place, grads, mark, self.step)))
        self._submitted += 1

    def _steps(self, number: int, place: int, grads: list[Tensor], mark: object, step: int) -> Steps:
        """One chunk: the first brings the gradients into the unit's buffer, unless they are read where they are; the last takes
        them back, unless they are views of it. Lanes keep their order.
        """
        start_ns = time.perf_counter_ns()
        chunks, _ = self._units[number]
        chunk, numel = chunks[place], sum(chunk.numel for chunk in chunks)
        scaling = self._scaling.first() if chunk.option.compresses and self._executor.keeps_scale(chunk) else self._scaling
        streams.wait(mark)
        buffer = self._buffer(number, grads)
        start = sum(before.numel for before in chunks[:place])
        x = buffer[start : start + self._executor.buffer_numel(chunk)]
        source = None
        if self._executor.reads_parts(chunk) and Parts.fit(grads):
            source = Parts(grads, scaling.before)[start : start + chunk.numel]
        elif number not in self._buffers:
            _bring(x, x, scaling.before)
        elif place == 0:
            for part, grad in _pairs(buffer[:numel], grads):
                _bring(grad, part, scaling.before)
            buffer[numel:].zero_()
        streams.used(grads)
        wanted = grads if number not in self._views else []
        del grads
        if self._recorder is not None:
            self._recorder.lane(0).mark(Mark.COPY_IN, step, chunk.index, start_ns)
        yield from self._executor.run(chunk, x, step, source)
        start_ns = time.perf_counter_ns()
        if scaling.after != 1.0:
            x.mul_(scaling.after)
        if chunk is chunks[-1] and wanted:
            for part, grad in _pairs(buffer[:numel], wanted):
                if part.data_ptr() != grad.data_ptr():
                    grad.copy_(part)
        if self._recorder is not None:
            writer = self._recorder.lane(self._executor.lanes_of(chunk))
            writer.mark(Mark.COPY_OUT, step, chunk.index, start_ns)
            writer.mark(Mark.DONE, step, chunk.index)

    def _buffer(self, number: int, grads: list[Tensor]) -> Tensor:
        """The flat buffer: the gradient itself where it can serve, else one that is kept for the unit."""
        if number not in self._buffers:
            if grads[0].dtype == self._dtype(number) and grads[0].is_contiguous():
                return grads[0].view(-1)
            self._buffers[number] = self._new_buffer(number)
        return self._buffers[number]

    def _needs_buffer(self, number: int) -> bool:
        """Whether the gradient can't serve, as far as its parameter tells: several tensors, another dtype, or padding."""
        _, members = self._units[number]
        first = members[0]
        return len(members) > 1 or first.dtype != self._dtype(number) or self._buffer_numel(number) != first.param.numel()

    def _new_buffer(self, number: int) -> Tensor:
        device = self._units[number][1][0].param.device
        return torch.empty(self._buffer_numel(number), dtype=self._dtype(number), device=device)

    def _takes_gradients(self, number: int) -> bool:
        """Whether parts of the unit's buffer can be the gradients when the sum is there, so that nothing is copied back."""
        return all(member.held is None and member.dtype == self._dtype(number) for member in self._units[number][1])

    def _views_of(self, number: int) -> list[Tensor]:
        params = [member.param for member in self._units[number][1]]
        numels = [param.numel() for param in params]
        parts = self._buffers[number][: sum(numels)].split(numels)
        return [part.view(param.shape) for part, param in zip(parts, params, strict=True)]

    def _buffer_numel(self, number: int) -> int:
        return sum(map(self._executor.buffer_numel, self._units[number][0]))  # only the last chunk may have padding

    def _dtype(self, number: int) -> torch.dtype:
        return self._units[number][0][0].dtype(self._wire_dtype)


def _pairs(buffer: Tensor, grads: list[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
    """Gradients with their parts of the unit's buffer, in the same shapes."""
    parts = buffer.split([grad.numel() for grad in grads])
    return [(part.view(grad.shape), grad) for part, grad in zip(parts, grads, strict=True)]


def _bring(grad: Tensor, part: Tensor, factor: float) -> None:
    """Write `factor` times a gradient to its part of the unit's buffer, which may be the gradient itself."""
    apart = part.data_ptr() != grad.data_ptr()
    if apart and grad.dtype == part.dtype and factor != 1.0:
        torch.mul(grad, factor, out=part)
        return
    if apart:
        part.copy_(grad)
    if factor != 1.0:
        part.mul_(factor)


def gradient_of(param: torch.nn.Parameter) -> Tensor:
    """The parameter's gradient; zeros, kept as its gradient, where it has none."""
    if param.grad is None:
        param.grad = torch.zeros_like(param)
    return param.grad
