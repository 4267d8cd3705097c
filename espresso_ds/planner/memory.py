"""Memory that a plan takes on the busiest rank beside model and optimizer: what feedback keeps, and buffers of payloads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from ..core.config import CompressorSettings
from ..core.memory import feedback_bytes, must_reverse, receiver_bytes
from ..core.option import Action, Device, Level, Option, Task
from ..core.profile import ModelTrace
from .cost import WIRE_BYTES, Costs, Shape, operations
from .timeline import Unit

ROW_ALIGNMENT = 16
"""Bytes to whose multiples payload rows are padded."""
_DENSE_BYTES = 4  # a unit that compresses is kept in float32


class Memory(NamedTuple):
    """Bytes of one rank."""

    feedback: int
    buffers: int


def precision_of(trace: ModelTrace) -> str:
    """Of the gradients: "fp32", "bf16" or "fp16"."""
    return str(trace.config.get("precision", "fp32"))


@lru_cache(maxsize=1 << 15)
def feedback_per_element(option: Option, settings: CompressorSettings, shape: Shape, precision: str = "fp32") -> float:
    """Bytes of feedback for each element of a unit: at every compression for what the rank is then in charge of, and what
    receivers keep, at every decompression. A rank that is some unit's root is counted as such.

    Args:
        option: of the unit.
        settings: of its codec; feedback that is not named counts as "ef".
        shape: of the cluster.
        precision: of the gradients: "fp32", "bf16" or "fp16".

    Raises:
        UnsupportedError: a memory that the feedback cannot have.
    """
    mode, found, compressions = settings.feedback or "ef", 0.0, 0
    reversible = must_reverse(mode, precision)
    for action, share in _shares(option, shape):
        if action.task is Task.COMPRESS:
            found += share * feedback_bytes(mode, settings.residual, reversible, recompressed=compressions > 0)
            compressions += 1
        elif action.task is Task.DECOMPRESS:
            found += share * receiver_bytes(mode, settings.residual, reversible)
    return found


def _shares(option: Option, shape: Shape) -> Iterator[tuple[Action, float]]:
    """Each action with the share of the unit that its rank is in charge of."""
    parts, divided = 1, []
    for action in option.actions:
        yield action, 1 / parts
        if not isinstance(action.at, Level):
            continue
        if action.task in (Task.REDUCE_SCATTER, Task.ALLTOALL):
            parts *= shape.ranks(action.at)
            divided.append(action.at)
        elif action.task is Task.ALLGATHER and divided and divided[-1] is action.at:
            parts //= shape.ranks(divided.pop())


def buffer_bytes(option: Option, numel: int, costs: Costs, codec: int = 0) -> int:
    """Bytes that the runtime keeps for a unit of `numel` elements: two row buffers, each as large as the most that it ever holds,
    and what uncompressed routines need beside the unit itself. Offloading's buffers on the host are left out. Raises FileError.
    """
    rows, buffer, packed = [0, 0], 0, False
    part = received = 0
    dense = False
    for op in operations(option, codec, costs.shape):
        if op.task is Task.DECOMPRESS:
            packed = False
            continue
        if isinstance(op.action.at, Device):
            packed, buffer = True, 0
        elif not packed:
            dense = True
            elements = -(-numel // op.divisor)
            if op.task is Task.REDUCE_SCATTER:
                ranks = costs.shape.ranks(op.action.at)
                part, received = max(part, -(-elements // ranks)), max(received, -(-elements // ranks) * ranks)
            elif op.task is Task.ALLGATHER:
                part = max(part, elements)
            continue
        assert op.payload_of is not None
        row = int(costs.payload_nbytes(op.payload_of, -(-numel // op.divisor), codec))
        row = -(-row // ROW_ALIGNMENT) * ROW_ALIGNMENT
        rows[buffer] = max(rows[buffer], op.rows * row)
        if op.task in (Task.ALLGATHER, Task.ALLTOALL, Task.GATHER) and isinstance(op.action.at, Level):
            grown = op.rows * (1 if op.task is Task.ALLTOALL else costs.shape.ranks(op.action.at))
            buffer = 1 - buffer
            rows[buffer] = max(rows[buffer], grown * row)
    wire = numel * costs.element_bytes if dense and option.compresses and costs.element_bytes != _DENSE_BYTES else 0
    return sum(rows) + wire + (part + received) * costs.element_bytes


def unit_bytes(unit: Unit, costs: Costs) -> int:
    """Bytes of the flat buffer that a unit is gathered in; none where the gradient itself serves."""
    itemsize = _DENSE_BYTES if unit.option.compresses else costs.element_bytes
    alone = unit.stop - unit.start == 1 and WIRE_BYTES.get(unit.dtype) == itemsize
    return 0 if alone else unit.numel * itemsize


def memory_of(units: Sequence[Unit], costs: Costs, precision: str = "fp32") -> Memory:
    """What a plan of these units takes. Raises FileError (a size was not measured), UnsupportedError."""
    feedback = buffers = 0.0
    for unit in units:
        buffers += unit_bytes(unit, costs)
        for piece in unit.pieces(costs.world):
            buffers += buffer_bytes(piece.option, piece.numel, costs, piece.codec)
            settings = costs.codecs[piece.codec].compressor
            if piece.option.compresses:
                feedback += piece.numel * feedback_per_element(piece.option, settings, costs.shape, precision)
    return Memory(round(feedback), round(buffers))
