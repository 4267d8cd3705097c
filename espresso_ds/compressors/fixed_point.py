"""Fixed point with one scale in half precision for each column: the quantizer of AQ-SGD (Wang et al., NeurIPS 2022).

Activations of shape (batch, features) have a column for each feature, and its scale is the largest magnitude in the batch; those
of shape (batch, sequence, features) take it over batch and sequence (`for_shape`). What has no shape is one column.

decode = q * s / m, m = 2**(bits - 1) - 1, q in -m..m, s = the largest magnitude of the column, rounded up to fp16 and at most
65504. Zero is on the grid, unlike on AQ-SGD's own: so the error of an element is at most min(|p|, s / (2 m)), but for what lies
beyond 65504, and the codec contracts. Biased, deterministic. A column with NaN or Inf decodes to NaN.

Payload: 2 columns + ceil(n / 8) bits bytes: scales (fp16), packed q.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import bits
from .base import Codec
from .spanwise import keep

_FP16 = torch.finfo(torch.float16)


@dataclass(frozen=True)
class FixedPoint(Codec):
    """`bits` (2 to 8) per element and a scale for each of `columns`. Raises ValueError."""

    bits: int
    columns: int = 1

    name = "fixed_point"
    contractive = True

    def __post_init__(self) -> None:
        if self.bits < 2:
            raise ValueError("fixed_point needs 2 bits at least: one for the sign, one for the rest")

    def for_shape(self, shape: Sequence[int]) -> Codec:
        """A column for each place in the batch, or in batch and sequence."""
        columns = 1
        for length in shape[2:] if len(shape) == 3 else shape[1:]:
            columns *= length
        return replace(self, columns=max(1, columns))

    def payload_nbytes(self, numel: int) -> int:
        """2 columns + ceil(n / 8) bits."""
        return 2 * self.columns + bits.packed_nbytes(numel, self.bits) if numel else 0

    def encode(self, x: Tensor, payload: Tensor, seed: int, residual: Tensor | None = None, kept: Tensor | None = None) -> None:
        """Scale by columns and round to nearest even."""
        if x.numel() == 0:
            return
        p = (x if residual is None else x + residual).view(-1, self.columns)
        scales, packed = self._fields(payload)
        largest = p.abs().amax(0)
        scales.copy_(_rounded_up(largest))
        step = scales.float() / self._top
        inverse = torch.where(step > 0, 1 / step, 0.0)  # NaN gives 0
        levels = (p.nan_to_num(0.0, 0.0, 0.0) * inverse).round_().clamp_(-self._top, self._top)
        bits.pack_levels((levels + self._top).to(torch.uint8).view(-1), self.bits, packed)
        if kept is not None:
            keep((p - levels * step).view(-1), kept)

    def decode_add(self, payload: Tensor, out: Tensor, seed: int) -> None:
        """Add q * s / m."""
        if out.numel() == 0:
            return
        scales, packed = self._fields(payload)
        levels = bits.unpack_levels(packed, self.bits, out.numel()).view(-1, self.columns).float()
        out.add_(((levels - self._top) * (scales.float() / self._top)).view(-1))

    @property
    def _top(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def _fields(self, payload: Tensor) -> tuple[Tensor, Tensor]:
        return payload[: 2 * self.columns].view(torch.float16), payload[2 * self.columns :]


def _rounded_up(largest: Tensor) -> Tensor:
    """fp16, no smaller than `largest` (float32, not negative) as far as fp16 goes; NaN where that is not finite."""
    half = largest.clamp(max=_FP16.max).half()
    up = (half.view(torch.int16) + 1).view(torch.float16)
    half = torch.where((half.float() < largest) & (half < _FP16.max), up, half)
    return torch.where(largest.isfinite(), half, torch.nan)
