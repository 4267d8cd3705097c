"""SignSGD: the sign of every element and no magnitude (Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex
Problems", ICML 2018, algorithm 1; "signSGD with Majority Vote is Communication Efficient and Fault Tolerant", ICLR 2019,
algorithm 1).

decode = +1 or -1 by the sign bit, so that sign(0) = +1 and sign(-0) = -1. The sum over ranks is
    vote "mean": the sum of their signs, so that the mean over ranks is the mean of signs;
    vote "majority": their number times the sign that most of them have, 0 at a tie, so that the mean over ranks is the
        majority's sign.
Neither unbiased nor contractive: all scale is lost, and error feedback around it diverges (Karimireddy et al., ICML 2019,
whose `efsignsgd` mends that). It takes a learning rate of its own. Error per element: | |p| - 1 |. Elements without gradient
are sent as +1 all the same. NaN or Inf anywhere makes all of the decoded tensor NaN.

Payload: 4 + ceil(n / 8) bytes: a unit (fp32: 1, or the quiet NaN 0x7FC00000), sign bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .backend import kernel
from .bits import negative, pack, packed_nbytes, unpack
from .spanwise import Spanwise, poison, spans


@dataclass(frozen=True)
class SignSGD(Spanwise):
    """Signs, counted or put to the vote."""

    vote: Literal["majority", "mean"]

    name = "signsgd"
    parts_kernel = "signsgd_encode"

    @property
    def votes(self) -> bool:
        """Majorities of parts of the ranks do not make the majority of all."""
        return self.vote == "majority"

    def payload_nbytes(self, numel: int) -> int:
        """4 + ceil(n / 8)."""
        return 4 + packed_nbytes(numel, 1) if numel else 0

    def encode(self, x: Tensor, payload: Tensor, seed: int, residual: Tensor | None = None, kept: Tensor | None = None) -> None:
        """Sign bits, and whether all is finite."""
        if fused := kernel("signsgd_encode", x):
            return fused(x, residual, kept, payload)
        super().encode(x, payload, seed, residual, kept)

    def decode_add(self, payload: Tensor, out: Tensor, seed: int) -> None:
        """Add +1 or -1."""
        if fused := kernel("signsgd_decode_sum", out):
            return fused(payload[None], out, False, True)
        super().decode_add(payload, out, seed)

    def decode_sum(self, rows: Tensor, out: Tensor, seed: int) -> None:
        """Sum the signs; then, for a majority, the number of rows times the sum's sign."""
        if fused := kernel("signsgd_decode_sum", out):
            return fused(rows, out, self.votes, False)
        super().decode_sum(rows, out, seed)
        if self.votes:
            for span in spans(out):
                total = out[span]
                total.copy_(total.sign().mul_(len(rows)).add_(total - total))  # the latter is 0, or NaN for NaN

    def _fields(self, payload: Tensor, numel: int) -> tuple[Tensor, ...]:
        return payload[:4].view(torch.float32), payload[4:]

    def _write(self, p: Tensor, fields: tuple[Tensor, ...], span: slice, seed: int) -> None:
        unit, signs = fields
        if span.start == 0:
            unit.fill_(1.0)
        unit.masked_fill_(poison(p).isnan(), torch.nan)
        pack(negative(p), 1, signs[_bytes(span)])

    def _read(self, fields: tuple[Tensor, ...], span: slice) -> Tensor:
        unit, signs = fields
        bits = unpack(signs[_bytes(span)], 1, span.stop - span.start)
        return unit - (2 * unit) * bits


def _bytes(span: slice) -> slice:
    """Where the sign bits of a span lie; spans begin with a byte."""
    return slice(packed_nbytes(span.start, 1), packed_nbytes(span.stop, 1))
