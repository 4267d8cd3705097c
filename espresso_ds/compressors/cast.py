"""Casts to fp16 and bf16, rounding to nearest even.

Error per element, contractive: at most 2**-11 |p| (fp16) or 2**-8 |p| (bf16) within the format's normal range; what underflows
is rounded to a subnormal or to zero, which leaves an error of at most |p|; finite values beyond the largest of the format are
sent as that largest, so that the error memory stays finite, while NaN and Inf are sent as NaN. Biased, deterministic.
Payload: 2 n bytes; payloads may be summed in their own dtype (the sum may overflow to Inf, which shows).
Source: IEEE 754 for fp16 and for the rounding; Micikevicius et al., "Mixed Precision Training", ICLR 2018, for gradients in fp16;
Kalamkar et al., "A Study of BFLOAT16 for Deep Learning Training", 2019.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .spanwise import Spanwise


class _Cast(Spanwise):
    contractive = True
    sum_dtype: torch.dtype

    def payload_nbytes(self, numel: int) -> int:
        """2 n."""
        return 2 * numel

    def _fields(self, payload: Tensor, numel: int) -> tuple[Tensor, ...]:
        return (payload.view(self.sum_dtype),)

    def _write(self, p: Tensor, fields: tuple[Tensor, ...], span: slice, seed: int) -> None:
        largest = torch.finfo(self.sum_dtype).max
        fields[0][span] = p.clamp(-largest, largest).add_(p - p)  # the latter is 0, or NaN for Inf

    def _read(self, fields: tuple[Tensor, ...], span: slice) -> Tensor:
        return fields[0][span]


@dataclass(frozen=True)
class Fp16(_Cast):
    """IEEE half precision."""

    name = "fp16"
    sum_dtype = torch.float16


@dataclass(frozen=True)
class Bf16(_Cast):
    """bfloat16: the range of fp32, 8 bits of precision."""

    name = "bf16"
    sum_dtype = torch.bfloat16
