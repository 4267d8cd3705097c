"""Packing small integers into bits, in plain torch.

Bit order: element i of a field of `width` bits lies in byte i * width // 8, lowest bits first (numpy's "little" order). A
width that is not a power of two is the sum of powers of two, one plane each: 5 bits are a plane of 4 and a plane of 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_nbytes(numel: int, bits: int) -> int:
    """Bytes of `numel` fields of `bits` bits, padded to whole groups of eight fields."""
    return -(-numel // 8) * bits


def planes(packed: Tensor, numel: int, bits: int) -> list[tuple[int, int, Tensor]]:
    """The (shift, width, bytes) of each plane in a buffer of `packed_nbytes(numel, bits)` bytes, lowest bits first."""
    found, shift, at = [], 0, 0
    for width in (8, 4, 2, 1):
        if bits & width:
            size = packed_nbytes(numel, width)
            found.append((shift, width, packed[at : at + size]))
            shift, at = shift + width, at + size
    return found


def pack(levels: Tensor, width: int, out: Tensor) -> None:
    """Pack `levels` (uint8, shape (m,), below 2**width; width 1, 2, 4 or 8) into `out` (uint8, packed_nbytes(m, width))."""
    padded = torch.nn.functional.pad(levels, (0, -levels.numel() % 8))
    fields = padded.view(-1, 8 // width) << _shifts(width, levels)
    out.copy_(fields.sum(1, dtype=torch.uint8))


def unpack(packed: Tensor, width: int, numel: int) -> Tensor:
    """Inverse of `pack`: uint8 of shape (numel,)."""
    fields = (packed[:, None] >> _shifts(width, packed)) & (2**width - 1)
    return fields.view(-1)[:numel]


def pack_levels(levels: Tensor, bits: int, packed: Tensor) -> None:
    """Pack `levels` (uint8, shape (m,), below 2**bits) into the planes of `packed` (uint8, packed_nbytes(m, bits))."""
    for shift, width, plane in planes(packed, levels.numel(), bits):
        pack((levels >> shift) & (2**width - 1), width, plane)


def unpack_levels(packed: Tensor, bits: int, numel: int) -> Tensor:
    """Inverse of `pack_levels`: uint8 of shape (numel,)."""
    levels = packed.new_zeros(numel)
    for shift, width, plane in planes(packed, numel, bits):
        levels |= unpack(plane, width, numel) << shift
    return levels


def negative(x: Tensor) -> Tensor:
    """The sign bits of `x` (float32): uint8 of its shape, 1 for negative, for -0.0, and for NaN with its sign bit set."""
    return (x.view(torch.int32) < 0).to(torch.uint8)


def _shifts(width: int, like: Tensor) -> Tensor:
    return torch.arange(0, 8, width, dtype=torch.uint8, device=like.device)
