"""EF-SignSGD: one bit per element and the mean magnitude (Karimireddy et al., "Error Feedback Fixes SignSGD", ICML 2019,
algorithm 2).

decode = scale * sign(x) with scale = |x|_1 / n, sign(0) = +1 and sign(-0) = -1.
Biased, contractive: |x - decode|^2 = |x|^2 - |x|_1^2 / n <= (1 - 1/n) |x|^2, since |x|_1 >= |x|.
Payload: 4 + ceil(n / 8) bytes: scale (fp32), sign bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Codec
from .bits import abs_sum, pack_signs, packed_nbytes, sign_table, spans, unpack_signs


@dataclass(frozen=True)
class EFSignSGD(Codec):
    """Signs, scaled by the mean magnitude of the whole tensor."""

    name = "efsignsgd"
    contractive = True

    def payload_nbytes(self, numel: int) -> int:
        """4 + ceil(n / 8)."""
        return 4 + packed_nbytes(numel, 1)

    def encode(self, x: Tensor, payload: Tensor, seed: int, error: Tensor | None = None) -> None:
        """Two passes: the scale, then signs and error together. The scale of a tensor with NaN or Inf is NaN or Inf."""
        table = sign_table(payload[:4].view(torch.float32).fill_(abs_sum(x) / x.numel()))
        for span in spans(x):
            signs = payload[_bytes(span)]
            pack_signs(x[span], signs)
            if error is not None:
                torch.sub(x[span], unpack_signs(signs, table, span.stop - span.start), out=error[span])

    def decode_add(self, payload: Tensor, out: Tensor, seed: int) -> None:
        """Add +scale or -scale, eight elements per table look-up."""
        table = sign_table(payload[:4].view(torch.float32))
        for span in spans(out):
            out[span].add_(unpack_signs(payload[_bytes(span)], table, span.stop - span.start))


def _bytes(span: slice) -> slice:
    """Where the sign bits of a span lie in the payload; spans start at multiples of eight."""
    return slice(4 + span.start // 8, 4 + packed_nbytes(span.stop, 1))
