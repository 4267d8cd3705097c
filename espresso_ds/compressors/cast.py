"""Casts to fp16 and bf16, rounding to nearest even.

Error per element, contractive: at most 2**-11 |x| (fp16) or 2**-8 |x| (bf16) within the normal range; what underflows is
rounded to a subnormal or to zero, which leaves an error of at most |x|; finite values beyond the largest of the format are
sent as that largest, so that the error memory stays finite, while Inf and NaN stay what they are. Biased, deterministic.
Payload: 2 n bytes; payloads may be summed in their own dtype (the sum may overflow to Inf, which shows).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import bits
from .base import Codec


class _Cast(Codec):
    contractive = True
    sum_dtype: torch.dtype

    def payload_nbytes(self, numel: int) -> int:
        """2 n."""
        return 2 * numel

    def encode(self, x: Tensor, payload: Tensor, seed: int, error: Tensor | None = None) -> None:
        """Cast span by span, so that the error finds both operands in the cache."""
        packed, largest = payload.view(self.sum_dtype), torch.finfo(self.sum_dtype).max
        for span in bits.spans(x):
            part = x[span]
            # A norm below the limit bounds every element and is the cheapest pass that does; 0.9 covers its rounding.
            if not (bits.on_cpu(part) and torch.linalg.vector_norm(part).item() < 0.9 * largest):
                part = torch.where(part.isinf(), part, part.clamp(-largest, largest))
            packed[span].copy_(part)
            if error is not None:
                torch.sub(x[span], packed[span], out=error[span])

    def decode_add(self, payload: Tensor, out: Tensor, seed: int) -> None:
        """Widen and add."""
        packed = payload.view(self.sum_dtype)
        for span in bits.spans(out):
            out[span].add_(packed[span])


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
