"""FP8: eight bits of floating point, with one fp32 scale per block of 1024 elements (Micikevicius et al., "FP8 Formats for
Deep Learning", 2022).

decode = scale * q, scale = max |p| of the block / M, with M the format's largest: 448 for e4m3 (4 bits of exponent, 3 of
mantissa), 57344 for e5m2. Rounding to nearest even. Error per element, contractive: at most |p|, and
    e4m3: max(2**-4 |p|, 2**-10 max |p| / 448)        e5m2: max(2**-3 |p|, 2**-17 max |p| / 57344)
(times 1 + 2**-22 for fp32's own rounding). Zero is exact. Biased, deterministic. Blocks whose scale would be subnormal are
sent as zeros. A block with NaN or Inf decodes to NaN: its scale is the quiet NaN 0x7FC00000, all its codes are 0x7F.

Payload: n + 4 ceil(n / 1024) bytes: scales (fp32), codes. The scale's 4 bytes are 0.4%. Not summable.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from .backend import kernel
from .spanwise import Spanwise, covering, grid, in_rows

BLOCK = 1 << 10
_NAN = 0x7F
_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Fp8(Spanwise):
    """Scaled fp8: "e4m3" for precision, "e5m2" for range within a block."""

    format: Literal["e4m3", "e5m2"]

    name = "fp8"
    parts_kernel = "fp8_encode"
    contractive = True

    def payload_nbytes(self, numel: int) -> int:
        """4 ceil(n / 1024) + n."""
        return 4 * -(-numel // BLOCK) + numel

    def encode(self, x: Tensor, payload: Tensor, seed: int, residual: Tensor | None = None, kept: Tensor | None = None) -> None:
        """Scale and round to nearest even."""
        if fused := kernel("fp8_encode", x):
            return fused(x, residual, kept, payload, *self.kernel_arguments(seed))
        super().encode(x, payload, seed, residual, kept)

    def kernel_arguments(self, seed: int) -> tuple[object, ...]:
        """The format."""
        return (self.format,)

    def decode_add(self, payload: Tensor, out: Tensor, seed: int) -> None:
        """Add the values."""
        if fused := kernel("fp8_decode_sum", out):
            return fused(payload[None], out, self.format, True)
        super().decode_add(payload, out, seed)

    def decode_sum(self, rows: Tensor, out: Tensor, seed: int) -> None:
        """In one pass over `out` where there is a kernel."""
        if fused := kernel("fp8_decode_sum", out):
            return fused(rows, out, self.format, False)
        super().decode_sum(rows, out, seed)

    def _fields(self, payload: Tensor, numel: int) -> tuple[Tensor, ...]:
        head = 4 * -(-numel // BLOCK)
        return payload[:head].view(torch.float32), payload[head:]

    def _write(self, p: Tensor, fields: tuple[Tensor, ...], span: slice, seed: int) -> None:
        scales, codes = fields
        rows, dtype = in_rows(p, BLOCK), _DTYPES[self.format]
        scale, inverse = grid(rows.abs().amax(1), torch.finfo(dtype).max)
        scales[covering(span, BLOCK)] = scale
        scaled = rows * inverse[:, None]  # a millionth beyond the largest at most, which rounds to the largest
        wire = scaled.to(dtype).view(torch.uint8).masked_fill_(scale.isnan()[:, None], _NAN)
        codes[span] = wire.view(-1)[: p.numel()]

    def _read(self, fields: tuple[Tensor, ...], span: slice) -> Tensor:
        scales, codes = fields
        # On a CPU torch looks fp8 up in a table seven times as fast as it converts e4m3.
        values = _table(self.format, codes.device).index_select(0, codes[span].int())
        rows = in_rows(values, BLOCK) * scales[covering(span, BLOCK), None]
        return rows.view(-1)[: values.numel()]


@cache
def _table(format: str, device: torch.device) -> Tensor:
    """What each of the 256 codes stands for, in float32."""
    return torch.arange(256, dtype=torch.uint8).view(_DTYPES[format]).float().to(device)
