"""Uniform quantization to 1..8 bits within the range of each block of 4096 elements, rounding to nearest (Seide et al.,
"1-Bit SGD", Interspeech 2014, for one bit; Alistarh et al., "QSGD", NeurIPS 2017, for blocks).

decode = (q - zero) * step with q in 0..L, L = 2**bits - 1, step = (hi - lo) / L, zero = round(-lo / step), where lo <= 0 <=
hi are the extremes of the block and zero. Zero is thus on the grid: rows of an embedding that got no gradient stay exactly
zero (Adam would turn any noise there into full steps), and every element's error is at most min(|x|, step / 2), which makes
the codec contractive for any input. Without it a block with one spike would get half a step of noise everywhere. One bit
cannot hold both signs on such a grid, so there the two levels are the means of the negative and of the other elements, which
is contractive too: |x - decode|^2 <= |x|^2 - (n_neg lo^2 + n_pos hi^2). Biased, deterministic. Blocks whose step underflows
fp32's normal range decode to zero (error x, kept by the error memory).

Payload: 8 ceil(n / 4096) + ceil(n / 8) bits bytes: steps (fp32), zeros (fp32), packed q. At 4 bits the blocks' 8 bytes are
0.4%; in longer blocks the range, and with it the error, follows the largest of more elements (and of more rows of a matrix),
for less to save.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Codec
from .bits import convert, pack, packed_nbytes, planes, scratch, spans, unpack

BLOCK = 1 << 12
_FP32 = torch.finfo(torch.float32)


@dataclass(frozen=True)
class Quantize(Codec):
    """`bits` per element."""

    bits: int

    name = "quantize"
    contractive = True

    def payload_nbytes(self, numel: int) -> int:
        """8 ceil(n / 4096) + ceil(n / 8) bits."""
        return 8 * -(-numel // BLOCK) + packed_nbytes(numel, self.bits)

    def encode(self, x: Tensor, payload: Tensor, seed: int, error: Tensor | None = None) -> None:
        """Per span of whole blocks: range, levels, packed bits, error. A block with NaN or Inf gets a step that is not finite."""
        steps, zeros, fields = self._fields(payload, x.numel())
        for span, blocks, length in _rows(x):
            _range(x[span].view(-1, length), self.bits, lo=zeros[blocks], hi=steps[blocks])
        _grid(steps, zeros, self.bits)
        inverses = torch.where(steps == 0, 0.0, 1 / steps)
        for span, blocks, length in _rows(x):
            rows, step, zero, inverse = x[span].view(-1, length), steps[blocks], zeros[blocks], inverses[blocks]
            levels = torch.mul(rows, inverse[:, None], out=scratch(x, rows.numel()).view_as(rows))
            levels.add_(zero[:, None]).round_().clamp_(0, 2**self.bits - 1)
            whole = convert(levels.view(-1), scratch(x, rows.numel(), torch.uint8))
            for shift, width, packed in fields:
                part = whole if width == self.bits else (whole >> shift) & (2**width - 1)
                pack(part, width, packed[_bytes(span, width)])
            if error is not None:
                levels.sub_(zero[:, None]).mul_(step[:, None])  # in the steps of decode_add, so that the error is exact
                torch.sub(x[span], levels.view(-1), out=error[span])

    def decode_add(self, payload: Tensor, out: Tensor, seed: int) -> None:
        """Add (q - zero) * step."""
        steps, zeros, fields = self._fields(payload, out.numel())
        for span, blocks, length in _rows(out):
            numel = span.stop - span.start
            parts = ((shift, unpack(packed[_bytes(span, width)], width, numel)) for shift, width, packed in fields)
            _, whole = next(parts)
            for shift, part in parts:
                whole = whole | (part << shift)
            levels = convert(whole, scratch(out, numel)).view(-1, length)
            levels.sub_(zeros[blocks, None]).mul_(steps[blocks, None])
            out[span].add_(levels.view(-1))

    def _fields(self, payload: Tensor, numel: int) -> tuple[Tensor, Tensor, list[tuple[int, int, Tensor]]]:
        head = 4 * -(-numel // BLOCK)
        steps, zeros = payload[:head].view(torch.float32), payload[head : 2 * head].view(torch.float32)
        return steps, zeros, planes(payload[2 * head :], numel, self.bits)


def _range(rows: Tensor, bits: int, lo: Tensor, hi: Tensor) -> None:
    """Write what the outermost levels of each row of (blocks, length) shall stand for."""
    if bits == 1:
        lo.copy_(_mean(rows.clamp(max=0), rows < 0))
        hi.copy_(_mean(rows.clamp(min=0), rows >= 0))
    else:
        torch.amin(rows, 1, out=lo)
        torch.amax(rows, 1, out=hi)


def _grid(steps: Tensor, zeros: Tensor, bits: int) -> None:
    """Turn `steps` from upper ends into steps and `zeros` from lower ends into zero levels, for all blocks at once."""
    top = 2**bits - 1
    lo, hi = zeros.clamp_(max=0), steps.clamp_(min=0)
    step = hi / top - lo / top
    # Near the edge of fp32 the full range would overflow in decoding: finite ends get a narrower grid, at whose end values clip.
    limit = 0.9 * _FP32.max / top
    step = torch.where((step > limit) & hi.isfinite() & lo.isfinite(), limit, step)
    step.masked_fill_(step < _FP32.tiny, 0.0)
    zero = (-lo / step).masked_fill_(step == 0, 0.0)
    zeros.copy_((zero if bits == 1 else zero.round_()).clamp_(0, top))
    steps.copy_(step)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of each row over `mask`, outside of which `values` are zero; zero for an empty mask."""
    return (values.sum(1, dtype=torch.float64) / mask.sum(1).clamp_(min=1)).to(torch.float32)


def _rows(x: Tensor) -> list[tuple[slice, slice, int]]:
    """(elements, blocks, block length) of each span of whole blocks, then of the short last block."""
    whole = x.numel() // BLOCK * BLOCK
    rows = [(span, slice(span.start // BLOCK, span.stop // BLOCK), BLOCK) for span in spans(x, 0, whole)]
    if whole < x.numel():
        rows.append((slice(whole, x.numel()), slice(whole // BLOCK, whole // BLOCK + 1), x.numel() - whole))
    return rows


def _bytes(span: slice, width: int) -> slice:
    """Where a span lies in a plane; spans start at multiples of eight."""
    return slice(span.start * width // 8, packed_nbytes(span.stop, width))
