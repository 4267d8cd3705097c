"""Uniform quantization to 1..8 bits of each block of 4096 elements, rounding to nearest: the bucketed grids of QSGD (Alistarh et
al., NeurIPS 2017) without its randomness.

decode = (q - zero) * step with q in 0..top. Two grids:

minmax: top = 2**bits - 1, step = (hi - lo) / top, zero = round(-lo / step), where lo <= 0 <= hi are the extremes of the block
and zero. Zero is thus on the grid: rows of an embedding that got no gradient stay exactly zero (Adam would turn any noise there
into full steps), and every element's error is at most min(|p|, step / 2), which makes the codec contractive for any input.

absmax: top = 2**bits - 2, zero = top / 2, step = max|p| / zero: symmetric, zero on the grid, 4 bytes per block less; same bound.
One bit cannot hold zero and both signs: there the two levels are -s/2 and +s/2 with s = max|p|, which is not contractive.

Biased, deterministic. Blocks whose step underflows fp32's normal range decode to zero (error p, kept by the error memory).

Payload: (minmax 8, absmax 4) ceil(n / 4096) + ceil(n / 8) bits bytes: steps (fp32), minmax: zeros (fp32), packed q. At 4 bits
the blocks' 8 bytes are 0.4%; in longer blocks the range, and with it the error, follows the largest of more elements (and of more
rows of a matrix), for less to save.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import bits, blocks
from .backend import kernel
from .base import Codec

_FP32 = torch.finfo(torch.float32)


@dataclass(frozen=True)
class Quantize(Codec):
    """`bits` per element, on a grid over the `range` of the block: "minmax" or "absmax"."""

    bits: int
    range: str = "minmax"

    name = "quantize"
    parts_kernel = "quantize_encode"

    @property
    def contractive(self) -> bool:
        """All but the two levels of absmax with one bit, neither of which is zero."""
        return not (self._symmetric and self.bits == 1)

    def payload_nbytes(self, numel: int) -> int:
        """(4 or 8) ceil(n / 4096) + ceil(n / 8) bits."""
        return (4 if self._symmetric else 8) * blocks.count(numel) + bits.packed_nbytes(numel, self.bits)

    def encode(self, x: Tensor, payload: Tensor, seed: int, residual: Tensor | None = None, kept: Tensor | None = None) -> None:
        """A block with NaN or Inf is that of zeros, but for a step of NaN. Kernels write the same bytes as the reference."""
        if fused := kernel("quantize_encode", x):
            return fused(x, residual, kept, payload, *self.kernel_arguments(seed))
        numel, p = x.numel(), blocks.rows(x, residual)
        finite = p.isfinite().all(1)
        p = torch.where(finite[:, None], p, 0.0)
        step, zero, top = self._grid(p)
        inverse = torch.where(step == 0, 0.0, 1 / step)
        levels = (p * inverse[:, None] + zero[:, None]).clamp(0, top).round()
        steps, zeros, packed = self._fields(payload, numel)
        steps.copy_(torch.where(finite, step, torch.nan))
        if zeros is not None:
            zeros.copy_(zero)
        bits.pack_levels(levels.to(torch.uint8).view(-1)[:numel], self.bits, packed)
        if kept is not None:
            blocks.keep(p - (levels - zero[:, None]) * step[:, None], kept)

    def kernel_arguments(self, seed: int) -> tuple[object, ...]:
        """Bits, and whether the grid is symmetric."""
        return (self.bits, self.range == "absmax")

    def decode_add(self, payload: Tensor, out: Tensor, seed: int) -> None:
        """Add (q - zero) * step."""
        if fused := kernel("quantize_decode_sum", out):
            return fused(payload[None], out, self.bits, self.range == "absmax", True)
        steps, zeros, packed = self._fields(payload, out.numel())
        levels = bits.unpack_levels(packed, self.bits, out.numel())
        rows = torch.nn.functional.pad(levels, (0, -out.numel() % blocks.BLOCK)).view(-1, blocks.BLOCK).float()
        zero = _middle(self.bits) if zeros is None else zeros[:, None]
        out.add_(((rows - zero) * steps[:, None]).view(-1)[: out.numel()])

    def decode_sum(self, rows: Tensor, out: Tensor, seed: int) -> None:
        """In one pass over `out` where there is a kernel."""
        if fused := kernel("quantize_decode_sum", out):
            return fused(rows, out, self.bits, self.range == "absmax", False)
        super().decode_sum(rows, out, seed)

    @property
    def _symmetric(self) -> bool:
        return self.range == "absmax"

    def _fields(self, payload: Tensor, numel: int) -> tuple[Tensor, Tensor | None, Tensor]:
        head = 4 * blocks.count(numel)
        steps, rest = payload[:head].view(torch.float32), payload[head:]
        return (steps, None, rest) if self._symmetric else (steps, rest[:head].view(torch.float32), rest[head:])

    def _grid(self, p: Tensor) -> tuple[Tensor, Tensor, int]:
        """Steps and zero levels of the rows of `p` (finite), and the top level."""
        if self._symmetric:
            middle = _middle(self.bits)
            step = _usable(p.abs().amax(1) / p.new_tensor(max(1.0, middle)), middle)
            return step, torch.full_like(step, middle), int(2 * middle)
        top = 2**self.bits - 1
        lo, hi, divisor = p.amin(1).clamp(max=0), p.amax(1).clamp(min=0), p.new_tensor(top)
        step = _usable(hi / divisor - lo / divisor, top)
        zero = torch.where(step == 0, 0.0, (0.0 - lo) / step).round().clamp(0, top)
        return step, zero, top


def _middle(width: int) -> float:
    """The level that stands for zero on the symmetric grid: half way between the two there are, for one bit."""
    return (1 << (width - 1)) - 1 if width > 1 else 0.5


def _usable(step: Tensor, levels: float) -> Tensor:
    """Steps that underflow become zero; near the edge of fp32 `levels` of them would overflow in decoding: the ends then clip."""
    limit = 0.9 * _FP32.max / max(1.0, levels)
    return torch.where(step < _FP32.tiny, 0.0, step.clamp(max=limit))
