"""Natural compression: the sign and a power of two, rounded at random (Horváth et al., "Natural Compression for Distributed
Deep Learning", 2019, definition 1; the range of exponents is cut to fit eight bits).

|p| = 2**e m with m in [1, 2) is sent as 2**(e+1) with probability m - 1 and else as 2**e, by adding 23 random bits to the
mantissa and cutting it off. Codes hold 126 powers, 2**-62 to 2**63. Unbiased for every |p| between these; less is sent as
zero (or, if above 2**-63, rounded to 2**-62 or zero), more as 2**63. Contractive in the mean: E |p - decode|^2 <= |p|^2 / 8
within the range (theorem 1 there), and never more than |p|^2 outside; error per element at most |p|. Zero is exact. NaN and
Inf decode to NaN.

Payload: n bytes: bit 7 the sign, bits 0 to 6 zero for 0, e + 63 for 2**e, 127 for NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from . import random
from .backend import kernel
from .spanwise import Spanwise

LOWEST, HIGHEST = -62, 63
"""Exponents of the powers of two that are sent."""
_BIAS, _MANTISSA, _NAN = 127, 23, 127


@dataclass(frozen=True)
class Natural(Spanwise):
    """Powers of two."""

    name = "natural"
    parts_kernel = "natural_encode"
    unbiased = True
    contractive = True

    def payload_nbytes(self, numel: int) -> int:
        """One byte per element."""
        return numel

    def encode(self, x: Tensor, payload: Tensor, seed: int, residual: Tensor | None = None, kept: Tensor | None = None) -> None:
        """Add random bits and cut."""
        if fused := kernel("natural_encode", x):
            return fused(x, residual, kept, payload, *self.kernel_arguments(seed))
        super().encode(x, payload, seed, residual, kept)

    def kernel_arguments(self, seed: int) -> tuple[object, ...]:
        """The seed."""
        return (seed,)

    def decode_add(self, payload: Tensor, out: Tensor, seed: int) -> None:
        """Add the powers."""
        if fused := kernel("natural_decode_sum", out):
            return fused(payload[None], out, True)
        super().decode_add(payload, out, seed)

    def decode_sum(self, rows: Tensor, out: Tensor, seed: int) -> None:
        """In one pass over `out` where there is a kernel."""
        if fused := kernel("natural_decode_sum", out):
            return fused(rows, out, False)
        super().decode_sum(rows, out, seed)

    def _fields(self, payload: Tensor, numel: int) -> tuple[Tensor, ...]:
        return (payload,)

    def _write(self, p: Tensor, fields: tuple[Tensor, ...], span: slice, seed: int) -> None:
        pattern = p.view(torch.int32)
        magnitude = pattern & 0x7FFFFFFF
        draw = random.words(seed, span.start, p.numel(), p.device).bitwise_and_((1 << _MANTISSA) - 1)
        exponent = draw.add_(magnitude).bitwise_right_shift_(_MANTISSA)
        code = exponent.sub_(_BIAS + LOWEST - 1).clamp_(0, HIGHEST - LOWEST + 1)
        torch.maximum(code, (magnitude >> _MANTISSA).sub_(255 - _NAN), out=code)  # _NAN where all bits of the exponent are set
        fields[0][span] = code.bitwise_or_((pattern >> 24) & 0x80)

    def _read(self, fields: tuple[Tensor, ...], span: slice) -> Tensor:
        return _table(fields[0].device).index_select(0, fields[0][span].int())


@cache
def _table(device: torch.device) -> Tensor:
    """What each of the 256 codes stands for, in float32."""
    powers = torch.arange(LOWEST - 1.0, HIGHEST + 2).exp2()
    powers[0], powers[_NAN] = 0.0, torch.nan
    return torch.cat([powers, -powers]).to(device)
