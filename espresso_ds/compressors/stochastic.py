"""Uniform quantization that rounds at random, so that decoding gives the input in the mean: what QSGD and TernGrad share.

Each block of 512 elements has a step; level = floor(p / step + u) with u uniform in [0, 1) has the mean p / step, and is
sent in a code of fixed width: code = level + levels, in 0 .. 2 levels. Unbiased but for fp32's own rounding, 2**-23 of the
step or of p. Error per element: less than one step. Zero is exact. Blocks whose step would be subnormal are sent as zeros; a
block with NaN or Inf decodes to NaN.

Payload: 4 ceil(n / 512) + bits ceil(n / 8) bytes: steps (fp32), packed codes.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from . import random
from .bits import pack, packed_nbytes, planes, unpack
from .spanwise import Spanwise, covering, grid, in_rows

BLOCK = 1 << 9


class StochasticQuantizer(Spanwise):
    """`bits` per element, the sign included: `levels` = 2**(bits - 1) - 1 steps to either side of zero."""

    unbiased = True
    bits: int

    @abstractmethod
    def _norms(self, rows: Tensor) -> Tensor:
        """What `levels` steps shall span for each row of (blocks, BLOCK): float32, at least its largest magnitude."""

    @property
    def levels(self) -> int:
        """Steps from zero to the end of the grid."""
        return 2 ** (self.bits - 1) - 1

    def payload_nbytes(self, numel: int) -> int:
        """4 ceil(n / 512) + bits ceil(n / 8)."""
        return 4 * -(-numel // BLOCK) + packed_nbytes(numel, self.bits)

    def _fields(self, payload: Tensor, numel: int) -> tuple[Tensor, ...]:
        head = 4 * -(-numel // BLOCK)
        return payload[:head].view(torch.float32), *(packed for _, _, packed in planes(payload[head:], numel, self.bits))

    def _write(self, p: Tensor, fields: tuple[Tensor, ...], span: slice, seed: int) -> None:
        steps, *packed = fields
        rows = in_rows(p, BLOCK)
        step, inverse = grid(self._norms(rows), self.levels)
        steps[covering(span, BLOCK)] = step
        level = (rows * inverse[:, None]).view(-1)[: p.numel()]
        level.add_(random.uniform(seed, span.start, p.numel(), p.device)).floor_()
        level.nan_to_num_(0.0).clamp_(-self.levels, self.levels)  # of NaN and Inf the step tells
        codes = level.add_(self.levels).to(torch.uint8)
        for (shift, width), plane in zip(self._planes(), packed, strict=True):
            part = codes if width == self.bits else (codes >> shift) & (2**width - 1)
            pack(part, width, plane[_bytes(span, width)])

    def _read(self, fields: tuple[Tensor, ...], span: slice) -> Tensor:
        steps, *packed = fields
        numel = span.stop - span.start
        codes = torch.zeros(numel, dtype=torch.uint8, device=steps.device)
        for (shift, width), plane in zip(self._planes(), packed, strict=True):
            codes |= unpack(plane[_bytes(span, width)], width, numel) << shift
        rows = in_rows(codes.float().sub_(self.levels), BLOCK) * steps[covering(span, BLOCK), None]
        return rows.view(-1)[:numel]

    def _planes(self) -> list[tuple[int, int]]:
        """Shift and width of each bit plane of the codes."""
        return [(shift, width) for shift, width, _ in planes(torch.empty(0, dtype=torch.uint8), 0, self.bits)]


def _bytes(span: slice, width: int) -> slice:
    """Where the fields of a span lie in a plane; spans begin with a byte."""
    return slice(packed_nbytes(span.start, width), packed_nbytes(span.stop, width))
