"""TopK: the k elements of largest magnitude (Aji & Heafield, EMNLP 2017; Stich et al., NeurIPS 2018); and what all codecs that
choose elements by magnitude share: the payload, momentum, and the plain torch code.

Exact and deterministic: among equal magnitudes the lowest index is sent, NaN counts as larger than Inf, and there are always k
distinct indices, zeros included. Biased, contractive: |p - decode|^2 <= (1 - (1 - 2^-16) k/n) |p|^2 for elements in bf16's
normal range. Error per element: |p|, or 2^-8 |p| where sent.

Payload: 4 k + 4 ceil(n / 65536) bytes, k = max(1, round(density n)): how many are in each block of 65536 elements (int32),
values (bf16), and their places within the block (uint16), ascending. Two bytes per index instead of four, and two per value:
the rounding is far below what is dropped and goes into the error, and for the same bytes half as many elements again are sent
as with fp32. bf16 has fp32's range, so small gradients neither vanish nor need a scale. Where a codec finds fewer than k, the
counts say so, and the tail of values and places is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from .backend import kernel
from .base import Codec
from .spanwise import keep
from .threshold import MAGNITUDE, first_largest, reaching

BLOCK = 1 << 16
_LARGEST = torch.finfo(torch.bfloat16).max
_NAN = 0x7FC0
"""The bits of the one NaN that is sent; torch has several, by device and instruction set."""


@lru_cache(maxsize=4096)
def kept(density: float, numel: int) -> int:
    """How many of `numel` elements a sparsifier keeps."""
    return max(1, round(density * numel))


_count = kept  # inside of methods `kept` is the residual's name


@dataclass(frozen=True)
class TopK(Codec):
    """The share `density` of the elements that is largest in magnitude."""

    density: float

    name = "topk"
    contractive = True
    exact: ClassVar[bool] = True

    def payload_nbytes(self, numel: int) -> int:
        """4 k + 4 ceil(n / 65536)."""
        return 4 * kept(self.density, numel) + 4 * -(-numel // BLOCK) if numel else 0

    def encode(self, x: Tensor, payload: Tensor, seed: int, residual: Tensor | None = None, kept: Tensor | None = None) -> None:
        """Select, gather, round. What rounds to more than bf16 holds is sent as its largest, so that `kept` is finite."""
        if numel := x.numel():
            work = kernel("topk_encode", x) or topk_encode
            work(x, residual, kept, payload, _count(self.density, numel), self.exact)

    def encode_momentum(
        self,
        x: Tensor,
        velocity: Tensor,
        velocity_kept: Tensor | None,
        residual: Tensor | None,
        kept: Tensor | None,
        payload: Tensor,
        seed: int,
        momentum: float,
        scale: float = 1.0,
    ) -> None:
        """Momentum correction and momentum factor masking around the encoding (Lin et al., ICLR 2018, sections 3.1 and 3.2).

        u' = momentum * u + scale * x is accumulated where x is in `encode`: p = residual + u'. Where p is sent, u' is cleared.
        Elements are selected by sampled threshold (`threshold.reaching`), as the paper does, whatever `encode` does.

        Args:
            x, residual, kept, payload, seed: as for `encode`.
            velocity: u, float32 or bfloat16, shape (n,), contiguous, finite.
            velocity_kept: u', like `velocity`, and may be that itself; None if nobody wants to know. Finite, as `kept` is.
            momentum: share of u that stays.
            scale: factor of x, as from clipping.
        """
        if numel := x.numel():
            work = kernel("dgc_encode", x) or dgc_encode
            work(x, velocity, velocity_kept, residual, kept, payload, _count(self.density, numel), momentum, scale)

    def decode_add(self, payload: Tensor, out: Tensor, seed: int) -> None:
        """Widen and scatter; indices are distinct."""
        self._decode(payload[None], out, True)

    def decode_sum(self, rows: Tensor, out: Tensor, seed: int) -> None:
        """A block after the other, so that `out` stays in the cache."""
        self._decode(rows, out, False)

    def indices(self, payload: Tensor, numel: int) -> Tensor:
        """Which of `numel` elements a payload holds: int64, ascending, at most k."""
        counts, _, places = _fields(payload, numel, _count(self.density, numel))
        return join_index(counts, places)

    def _decode(self, rows: Tensor, out: Tensor, add: bool) -> None:
        if numel := out.numel():
            work = kernel("topk_decode_sum", out) or topk_decode_sum
            work(rows, out, _count(self.density, numel), add)


def topk_encode(x: Tensor, residual: Tensor | None, kept: Tensor | None, payload: Tensor, k: int, exact: bool) -> None:
    """`Codec.encode` of the k largest: exactly those, or by sampled threshold. The reference of the kernels of this name."""
    p = x if residual is None else x + residual
    index = largest(p, k) if exact else reaching(p, k)
    sent = _write(p, index, payload, k)
    if kept is not None:
        keep(p.index_add(0, index, sent, alpha=-1), kept)


def dgc_encode(
    x: Tensor,
    velocity: Tensor,
    velocity_kept: Tensor | None,
    residual: Tensor | None,
    kept: Tensor | None,
    payload: Tensor,
    k: int,
    momentum: float,
    scale: float,
) -> None:
    """`TopK.encode_momentum`. The reference of the kernels of this name."""
    turned = velocity.float() * momentum + x * scale  # not `add` with alpha, which may round once where this rounds twice
    p = turned if residual is None else turned + residual
    index = reaching(p, k)
    sent = _write(p, index, payload, k)
    if kept is not None:
        keep(p.index_add(0, index, sent, alpha=-1), kept)
    if velocity_kept is not None:
        keep(turned.index_fill(0, index, 0.0), velocity_kept)


def topk_decode_sum(rows: Tensor, out: Tensor, k: int, add: bool) -> None:
    """Add the sum of the payloads in `rows` (uint8, shape (count, stride)) to `out`, or overwrite it. The kernels' reference."""
    if not add:
        out.zero_()
    for row in rows:
        counts, values, places = _fields(row, out.numel(), k)
        index = join_index(counts, places)
        out.index_add_(0, index, values[: index.numel()].float())


def split_index(index: Tensor, counts: Tensor, places: Tensor) -> None:
    """Write ascending indices (int64) as `counts` per block (int32) and `places` in the block (uint16 in the bits of int16)."""
    edges = torch.arange(1, counts.numel() + 1, device=index.device) * BLOCK
    ends = torch.searchsorted(index, edges)
    counts.copy_(ends.diff(prepend=ends.new_zeros(1)))
    places.copy_(index & (BLOCK - 1))  # wraps above 32767, undone by the mask in join_index


def join_index(counts: Tensor, places: Tensor) -> Tensor:
    """Inverse of `split_index`: int64 indices, as many as the counts add up to."""
    starts = (torch.arange(counts.numel(), device=counts.device) * BLOCK).repeat_interleave(counts)
    return (places[: starts.numel()].long() & (BLOCK - 1)).add_(starts)


def largest(x: Tensor, k: int) -> Tensor:
    """Return the ascending indices (int64, shape (k,)) of the k largest magnitudes; ties go to the lowest index."""
    return first_largest(x.view(torch.int32) & MAGNITUDE, k)


def _fields(payload: Tensor, numel: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    blocks = -(-numel // BLOCK)
    counts, values, places = payload[: 4 * blocks + 4 * k].split([4 * blocks, 2 * k, 2 * k])
    return counts.view(torch.int32), values.view(torch.bfloat16), places.view(torch.int16)


def _write(p: Tensor, index: Tensor, payload: Tensor, k: int) -> Tensor:
    """Fill the payload with the elements of p at `index`; return their values as decoded (float32)."""
    counts, values, places = _fields(payload, p.numel(), k)
    number, selected = index.numel(), p[index]
    values[:number] = torch.where(selected.isinf(), selected, selected.clamp(-_LARGEST, _LARGEST))
    values.view(torch.int16)[:number].masked_fill_(selected.isnan(), _NAN)
    split_index(index, counts, places[:number])
    values[number:] = 0
    places[number:] = 0
    return values[:number].float()
