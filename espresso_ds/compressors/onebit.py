"""One bit per element and two means per block of 4096 (Seide et al., "1-Bit Stochastic Gradient Descent", Interspeech 2014:
threshold 0, and reconstruction values that are the means of what they stand for, there per column of a matrix).

decode = the mean of the negative elements of the block, or that of the others, by the sign bit; 0 for an empty side. Biased,
contractive: per block |p - decode|^2 = |p|^2 - (n_lower lower^2 + n_upper upper^2), at least as small as with the one scale of
EF-SignSGD: the means minimise it.

Payload: 8 ceil(n / 4096) + ceil(n / 8) bytes: lower means (fp32), upper means (fp32), sign bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import bits, blocks
from .backend import kernel
from .base import Codec


@dataclass(frozen=True)
class OneBit(Codec):
    """Signs, each standing for the mean of its side of the block."""

    name = "onebit"
    parts_kernel = "onebit_encode"

    @property
    def contractive(self) -> bool:
        """By the identity above."""
        return True

    def payload_nbytes(self, numel: int) -> int:
        """8 ceil(n / 4096) + ceil(n / 8)."""
        return 8 * blocks.count(numel) + bits.packed_nbytes(numel, 1)

    def encode(self, x: Tensor, payload: Tensor, seed: int, residual: Tensor | None = None, kept: Tensor | None = None) -> None:
        """The mean over NaN or Inf is NaN or Inf. Kernels may differ from the reference by 1e-6 of a mean."""
        if fused := kernel("onebit_encode", x):
            return fused(x, residual, kept, payload)
        numel, p = x.numel(), blocks.rows(x, residual)
        lowers, uppers, signs = self._fields(payload, numel)
        negative = bits.negative(p)
        below = negative.sum(1)
        lower = _mean(torch.where(negative.bool(), p, 0.0), below)
        upper = _mean(torch.where(negative.bool(), 0.0, p), blocks.lengths(numel, x) - below)
        lowers.copy_(lower)
        uppers.copy_(upper)
        bits.pack(negative.view(-1)[:numel], 1, signs)
        if kept is not None:
            blocks.keep(p - _decoded(negative, lower, upper), kept)

    def decode_add(self, payload: Tensor, out: Tensor, seed: int) -> None:
        """Add the lower or the upper mean."""
        if fused := kernel("onebit_decode_sum", out):
            return fused(payload[None], out, True)
        lowers, uppers, signs = self._fields(payload, out.numel())
        negative = torch.nn.functional.pad(bits.unpack(signs, 1, out.numel()), (0, -out.numel() % blocks.BLOCK))
        out.add_(_decoded(negative.view(-1, blocks.BLOCK), lowers, uppers).view(-1)[: out.numel()])

    def decode_sum(self, rows: Tensor, out: Tensor, seed: int) -> None:
        """In one pass over `out` where there is a kernel."""
        if fused := kernel("onebit_decode_sum", out):
            return fused(rows, out, False)
        super().decode_sum(rows, out, seed)

    def _fields(self, payload: Tensor, numel: int) -> tuple[Tensor, Tensor, Tensor]:
        head = 4 * blocks.count(numel)
        return payload[:head].view(torch.float32), payload[head : 2 * head].view(torch.float32), payload[2 * head :]


def _mean(side: Tensor, number: Tensor) -> Tensor:
    """Mean of `number` elements of each row, the others of which are zero; zero for none."""
    return (side.sum(1, dtype=torch.float64) / number.clamp(min=1)).float()


def _decoded(negative: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """What sign bits (uint8, shape (blocks, BLOCK)) stand for."""
    return torch.where(negative.bool(), lower[:, None], upper[:, None])
