"""All memory that one unit needs beside its gradients, taken once at the start."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..compressors.base import Codec, padded
from ..core.errors import UnsupportedError
from ..core.option import Device, Task
from .paths import Decode, Encode, MoveRows, MoveValues, Path
from .streams import Offload

LAST_STEP = 10**9
"""An optimizer step that no training reaches: by then every warm-up is over."""


def stride(codec: Codec, numels: tuple[int, ...]) -> int:
    """Bytes from one row to the next, if rows are payloads of so many elements."""
    return padded(max(map(codec.payload_nbytes, numels)))


@dataclass(frozen=True)
class Buffers:
    """What a unit keeps between steps; its routines and codecs allocate nothing.

    Attributes:
        rows: two buffers of payload rows, uint8: routines read one and write the other.
        wire: the unit in the dtype of the wire, where that is not its own; else None.
        part: one shard in the dtype of the wire, for what reduce-scatters leave and allgathers start from.
        received: on the CPU, where reduce-scatter is an alltoall and a sum, what arrives.
        host_rows: payload rows on the host, for codecs that run there but whose tensors do not.
        host_values: the elements that they work on, float32.
        order: the rows' order for the alltoalls that need another one, by the number of the action; int64.
    """

    rows: tuple[Tensor, Tensor]
    wire: Tensor | None
    part: Tensor
    received: Tensor
    host_rows: Tensor
    host_values: Tensor
    order: dict[int, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        single = (self.wire, self.part, self.received, self.host_rows, self.host_values)
        return sum(buffer.nbytes for buffer in (*self.rows, *single, *self.order.values()) if buffer is not None)


def allocate(
    path: Path, codec: Codec | None, dtype: torch.dtype, wire_dtype: torch.dtype, device: torch.device, offload: Offload
) -> Buffers:
    """The buffers of a unit on its way along `path`.

    Args:
        path: of this rank.
        codec: what the unit is compressed with; None if it is not.
        dtype: of the unit itself.
        wire_dtype: of what is sent uncompressed.
        device: of the unit.
        offload: how codecs on the host come to the tensors.

    Raises:
        UnsupportedError: the codec's payloads grow while training goes on.
    """
    strides = [] if codec is None else [_largest_stride(codec, numels) for numels in path.row_numels]
    rows = [0, 0]
    for buffer, count, compression in path.rows_needed():
        rows[buffer] = max(rows[buffer], count * strides[compression])
    on_host = [step for step in path.steps if isinstance(step, Encode | Decode) and step.device is Device.CPU and offload.needed]
    host_rows = max((_rows(step) * strides[step.compression] for step in on_host), default=0)
    host_values = max((step.extent.numel for step in on_host), default=0)
    dense = [step for step in path.steps if isinstance(step, MoveValues) and step.takes_part]
    parts = [step.mine.numel for step in dense if step.task in (Task.REDUCE_SCATTER, Task.ALLGATHER)]
    received = [step.whole.numel for step in dense if step.task is Task.REDUCE_SCATTER and device.type == "cpu"]
    return Buffers(
        rows=(_bytes(rows[0], device), _bytes(rows[1], device)),
        wire=torch.empty(path.buffer_numel, dtype=wire_dtype, device=device) if dense and dtype != wire_dtype else None,
        part=torch.empty(max(parts, default=0), dtype=wire_dtype, device=device),
        received=torch.empty(max(received, default=0), dtype=wire_dtype, device=device),
        host_rows=offload.host_buffer(host_rows, torch.uint8),
        host_values=offload.host_buffer(host_values, torch.float32),
        order={
            step.number: torch.tensor(step.arrange, device=device)
            for step in path.steps
            if isinstance(step, MoveRows) and step.arrange is not None
        },
    )


def _bytes(count: int, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device=device)


def _rows(step: Encode | Decode) -> int:
    return len(step.targets) if isinstance(step, Encode) else step.rows


def _largest_stride(codec: Codec, numels: tuple[int, ...]) -> int:
    first, last = stride(codec.at(0), numels), stride(codec.at(LAST_STEP), numels)
    if last > first:
        raise UnsupportedError(
            f"codec {codec.name}: payloads of {max(numels)} elements grow from {first} to {last} bytes while training goes on, "
            "but buffers are taken for the first step; plan with another codec"
        )
    return first
