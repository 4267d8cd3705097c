"""What a step of a path does to one unit's tensors: codec work, and routines on prepared buffers.

The unit's buffer `x` is flat and is both input and output. Between steps the unit is either dense (values in `x`) or packed (rows
of payload in one of two row buffers). Schemes see only bytes: every routine moves whole rows, and what a row decodes into is
known from the path. All ranks decode the same rows in the same order, so all end with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..compressors.base import Codec
from ..compressors.parts import Parts
from ..core.errors import UnsupportedError
from ..core.option import Device, Level, Task
from ..feedback import Feedback
from . import routines
from .buffers import Buffers, stride
from .lanes import Pending
from .paths import Decode, Encode, MoveRows, MoveValues, Path, Span
from .streams import Offload

Started = tuple[Pending, Callable[[], object]]
"""A routine under way, and what to do with its result."""


class Nothing:
    """A routine in which this rank takes no part."""

    def wait(self, timeout_s: float) -> None:
        """Return at once."""


NOTHING = Nothing()


def _done() -> None:
    pass


@dataclass(frozen=True)
class Carrier:
    """One unit on one rank.

    Args:
        label: of the unit, for its sites of feedback.
        path: what to do.
        buffers: taken for that path.
        feedback: memory of the unit's sites.
        groups: of this rank, by lane and level.
        offload: how codecs on the host come to the tensors.
    """

    label: str
    path: Path
    buffers: Buffers
    feedback: Feedback
    groups: Mapping[tuple[int, Level], ProcessGroup]
    offload: Offload

    def reads_parts(self, codec: Codec) -> bool:
        """Whether the first step encodes elements that lie apart, where they are."""
        first = self.path.steps[0]
        return isinstance(first, Encode) and not self.offload.needed and self.feedback.reads_parts(codec)

    def encode(self, step: Encode, x: Tensor | Parts, codec: Codec, seed: int) -> None:
        """Compress into row buffer 0."""
        rows = self._rows(0, len(step.targets), codec, step.compression)
        offloaded = self.offload.needed and step.device is Device.CPU
        source, first, payloads = x, 0, rows
        if offloaded:
            assert isinstance(x, Tensor)
            source, first = self.buffers.host_values[: step.extent.numel], step.extent.start
            payloads = self.buffers.host_rows[: rows.numel()].view(rows.shape)
            self.offload.fetch(source, _of(x, step.extent))
        for number, target in enumerate(step.targets):
            if target.numel:
                payload = payloads[number, : codec.payload_nbytes(target.numel)]
                values = source[target.start - first : target.stop - first]
                site = self._site(step, number)
                self.feedback.encode(codec, values, payload, seed, site, recompressed=step.compression > 0)
        if offloaded:
            self.offload.put(rows, payloads)

    def decode(self, step: Decode, x: Tensor, codec: Codec, seed: int) -> None:
        """Decompress a row buffer into `x`."""
        rows = self._rows(step.buffer, step.rows, codec, step.compression)
        offloaded = self.offload.needed and step.device is Device.CPU
        out, first = x, 0
        if offloaded:
            device_rows, rows = rows, self.buffers.host_rows[: rows.numel()].view(rows.shape)
            self.offload.fetch(rows, device_rows)
            out, first = self.buffers.host_values[: step.extent.numel], step.extent.start
        for number, (target, first_row, end_row) in enumerate(step.sums):
            total = out[target.start - first : target.stop - first]
            codec.decode_sum(rows[first_row:end_row], total, seed)
            self.feedback.decoded(total, self._decoded_site(step, number))
        if offloaded:
            self.offload.put(_of(x, step.extent), out)

    def release(self, x: Tensor, rank: int) -> None:
        """Add to `x` what this rank has not sent so far. Ranks that compress the same sums hold the same residuals of them: of
        those it is the rank that gave the stream its number.
        """
        for step in self.path.steps:
            if isinstance(step, Encode) and step.stream == rank:
                for number, target in enumerate(step.targets):
                    if target.numel:
                        self.feedback.release(_of(x, target), self._site(step, number))

    def forget(self) -> None:
        """Give back the memory of all sites."""
        for step in self.path.steps:
            if isinstance(step, Encode):
                self.feedback.forget(self._site(step, number) for number in range(len(step.targets)))
            elif isinstance(step, Decode):
                self.feedback.forget(self._decoded_site(step, number) for number in range(len(step.sums)))

    def start(self, step: MoveRows | MoveValues, x: Tensor, codec: Codec) -> Started:
        """Start a routine on rows of payload, or on uncompressed elements of `x`."""
        if not step.takes_part:
            return NOTHING, _done
        return self._move_values(step, x) if isinstance(step, MoveValues) else self._move_rows(step, codec)

    def _move_values(self, step: MoveValues, x: Tensor) -> Started:
        group = self.groups[step.lane, step.level]
        own, buffers = _of(x, step.whole), self.buffers
        wire = own if buffers.wire is None else _of(buffers.wire, step.whole)
        part = buffers.part[: step.mine.numel]
        if step.task is Task.ALLGATHER:
            part.copy_(_of(x, step.mine))
            return routines.allgather(wire, part, group), self._back(own, wire)
        if wire is not own:
            wire.copy_(own)
        if step.task is Task.REDUCE_SCATTER:
            received = buffers.received[: step.whole.numel] if not x.is_cuda else None
            return routines.reduce_scatter(part, wire, group, received), self._back(_of(x, step.mine), part)
        if step.task is Task.ALLREDUCE:
            return routines.allreduce(wire, group), self._back(own, wire)
        routine = routines.reduce if step.task is Task.REDUCE else routines.broadcast
        return routine(wire, step.root, group), self._back(own, wire)

    def _move_rows(self, step: MoveRows, codec: Codec) -> Started:
        group = self.groups[step.lane, step.level]
        rows = self._rows(step.buffer, step.rows, codec, step.compression)
        if step.arrange is not None:
            unordered = self._rows(1 - step.buffer, step.rows, codec, step.compression)
            torch.index_select(unordered, 0, self.buffers.order[step.number], out=rows)
        inp = rows.view(-1)
        if step.task is Task.ALLREDUCE:
            assert codec.sum_dtype is not None
            return routines.allreduce(inp[: codec.payload_nbytes(step.payload.numel)].view(codec.sum_dtype), group), _done
        if step.task is Task.BROADCAST:
            return routines.broadcast(inp, step.root, group), _done
        out = self._rows(step.buffer_after, step.rows_after, codec, step.compression).view(-1)
        if step.task is Task.ALLGATHER:
            return routines.allgather(out, inp, group), _done
        if step.task is Task.ALLTOALL:
            return routines.alltoall(out, inp, group), _done
        return routines.gather(out if step.rows_after else None, inp, step.root, group), _done

    def _site(self, step: Encode, number: int) -> str:
        return f"{self.label}/{step.compression}/{number}"

    def _decoded_site(self, step: Decode, number: int) -> str:
        return f"{self.label}/{step.compression}/decoded {number}"

    def _rows(self, buffer: int, count: int, codec: Codec, compression: int) -> Tensor:
        """`count` rows of a row buffer, as far apart as this step's payloads need."""
        width = stride(codec, self.path.row_numels[compression])
        memory = self.buffers.rows[buffer]
        if count * width > memory.numel():
            raise UnsupportedError(
                f"{self.label}: {count} payloads of {codec.name} take {count * width} bytes, only {memory.numel()} were taken "
                "at the start; payloads must not grow while training goes on: plan with another codec"
            )
        return memory[: count * width].view(count, width)

    @staticmethod
    def _back(target: Tensor, source: Tensor) -> Callable[[], object]:
        return _done if target.data_ptr() == source.data_ptr() else lambda: target.copy_(source)


def _of(x: Tensor, span: Span) -> Tensor:
    return x[span.start : span.stop]
