"""EF-SignSGD: one bit per element and the mean magnitude of each block of 4096 (Karimireddy et al., "Error Feedback Fixes
SignSGD", ICML 2019, algorithm 2, with the scale of a block where they take that of a layer).

decode = scale * sign(p) with scale = |p|_1 / n_b over the n_b elements of the block, sign by the sign bit, so that sign(0) = +1
and sign(-0) = -1. Biased, contractive: per block |p - decode|^2 = |p|^2 - |p|_1^2 / n_b <= (1 - 1/n_b) |p|^2, since
|p|_1 >= |p|.

Payload: 4 ceil(n / 4096) + ceil(n / 8) bytes: scales (fp32), sign bits. Scales of short blocks follow the magnitudes of rows and
layers within a unit, for 0.8% more bytes, and let a block be encoded in one visit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import bits, blocks
from .backend import kernel
from .base import Codec


@dataclass(frozen=True)
class EFSignSGD(Codec):
    """Signs, scaled by the mean magnitude of their block."""

    name = "efsignsgd"
    parts_kernel = "sign_encode"

    @property
    def contractive(self) -> bool:
        """By the identity above."""
        return True

    def payload_nbytes(self, numel: int) -> int:
        """4 ceil(n / 4096) + ceil(n / 8)."""
        return 4 * blocks.count(numel) + bits.packed_nbytes(numel, 1)

    def encode(self, x: Tensor, payload: Tensor, seed: int, residual: Tensor | None = None, kept: Tensor | None = None) -> None:
        """The scale of a block with NaN or Inf is NaN or Inf. Kernels may differ from the reference by 1e-6 of a scale."""
        if fused := kernel("sign_encode", x):
            return fused(x, residual, kept, payload)
        numel, p = x.numel(), blocks.rows(x, residual)
        scales, signs = self._fields(payload, numel)
        scale = (p.abs().sum(1, dtype=torch.float64) / blocks.lengths(numel, x)).float()
        negative = bits.negative(p)
        scales.copy_(scale)
        bits.pack(negative.view(-1)[:numel], 1, signs)
        if kept is not None:
            blocks.keep(p - _decoded(negative, scale), kept)

    def decode_add(self, payload: Tensor, out: Tensor, seed: int) -> None:
        """Add +scale or -scale."""
        if fused := kernel("sign_decode_sum", out):
            return fused(payload[None], out, True)
        scales, signs = self._fields(payload, out.numel())
        negative = torch.nn.functional.pad(bits.unpack(signs, 1, out.numel()), (0, -out.numel() % blocks.BLOCK))
        out.add_(_decoded(negative.view(-1, blocks.BLOCK), scales).view(-1)[: out.numel()])

    def decode_sum(self, rows: Tensor, out: Tensor, seed: int) -> None:
        """In one pass over `out` where there is a kernel."""
        if fused := kernel("sign_decode_sum", out):
            return fused(rows, out, False)
        super().decode_sum(rows, out, seed)

    def _fields(self, payload: Tensor, numel: int) -> tuple[Tensor, Tensor]:
        head = 4 * blocks.count(numel)
        return payload[:head].view(torch.float32), payload[head:]


def _decoded(negative: Tensor, scale: Tensor) -> Tensor:
    """What sign bits (uint8, shape (blocks, BLOCK)) stand for."""
    return torch.where(negative.bool(), -scale[:, None], scale[:, None])
