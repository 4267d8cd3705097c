"""Casts to fp16 and bf16, rounding to nearest even.

Error per element, contractive: at most 2**-11 |p| (fp16) or 2**-8 |p| (bf16) within the format's normal range; what underflows
is rounded to a subnormal or to zero, which leaves an error of at most |p|; finite values beyond the largest of the format are
sent as that largest, so that the error memory stays finite, while NaN and Inf are sent as one NaN, 0x7E00 (fp16) or 0x7FC0
(bf16). Biased, deterministic.
Payload: 2 n bytes; payloads may be summed in their own dtype (the sum may overflow to Inf, which shows).
Source: IEEE 754 for fp16 and for the rounding; Micikevicius et al., "Mixed Precision Training", ICLR 2018, for gradients in fp16;
Kalamkar et al., "A Study of BFLOAT16 for Deep Learning Training", 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .backend import kernel
from .spanwise import Spanwise


class _Cast(Spanwise):
    contractive = True
    parts_kernel = "cast_encode"
    sum_dtype: torch.dtype
    nan: ClassVar[int]
    """The bits of NaN, which devices convert to different ones."""

    def payload_nbytes(self, numel: int) -> int:
        """2 n."""
        return 2 * numel

    def encode(self, x: Tensor, payload: Tensor, seed: int, residual: Tensor | None = None, kept: Tensor | None = None) -> None:
        """Round to nearest even."""
        if fused := kernel("cast_encode", x):
            return fused(x, residual, kept, payload, *self.kernel_arguments(seed))
        super().encode(x, payload, seed, residual, kept)

    def kernel_arguments(self, seed: int) -> tuple[object, ...]:
        """The format."""
        return (self.name,)

    def decode_add(self, payload: Tensor, out: Tensor, seed: int) -> None:
        """Add the values."""
        if fused := kernel("cast_decode_sum", out):
            return fused(payload[None], out, self.name, True)
        super().decode_add(payload, out, seed)

    def decode_sum(self, rows: Tensor, out: Tensor, seed: int) -> None:
        """In one pass over `out` where there is a kernel."""
        if fused := kernel("cast_decode_sum", out):
            return fused(rows, out, self.name, False)
        super().decode_sum(rows, out, seed)

    def _fields(self, payload: Tensor, numel: int) -> tuple[Tensor, ...]:
        return (payload.view(self.sum_dtype),)

    def _write(self, p: Tensor, fields: tuple[Tensor, ...], span: slice, seed: int) -> None:
        largest = torch.finfo(self.sum_dtype).max
        fields[0][span] = p.clamp(-largest, largest)
        fields[0][span].view(torch.int16).masked_fill_(~p.isfinite(), self.nan)

    def _read(self, fields: tuple[Tensor, ...], span: slice) -> Tensor:
        return fields[0][span]


@dataclass(frozen=True)
class Fp16(_Cast):
    """IEEE half precision."""

    name = "fp16"
    sum_dtype = torch.float16
    nan = 0x7E00


@dataclass(frozen=True)
class Bf16(_Cast):
    """bfloat16: the range of fp32, 8 bits of precision."""

    name = "bf16"
    sum_dtype = torch.bfloat16
    nan = 0x7FC0
