"""TopK: the k elements of largest magnitude (Aji & Heafield, EMNLP 2017; Stich et al., NeurIPS 2018).

Exact and deterministic: among equal magnitudes the lowest index is kept, NaN counts as larger than Inf, and there are always
k distinct indices, zeros included, so that the payload's size is fixed by n. Biased, contractive: |x - decode|^2 <=
(1 - (1 - 2^-16) k/n) |x|^2.

Payload: 4 k + 4 ceil(n / 65536) bytes, k = max(1, round(density n)): how many are in each block of 65536 elements (int32),
values (bf16), and their places within the block (uint16), ascending. Two bytes per index instead of four, and two per value:
the rounding is far below what is dropped and goes into the error, and for the same bytes half as many elements again are sent
as with fp32. bf16 has fp32's range, so small gradients neither vanish nor need a scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import bits
from .base import Codec

BLOCK = 1 << 16
_SAMPLE = 1 << 16
_MAGNITUDE = 0x7FFFFFFF
"""All bits of an fp32 but the sign. Magnitudes compare as integers like as floats, and NaN is above Inf."""


def kept(density: float, numel: int) -> int:
    """How many of `numel` elements a sparsifier keeps."""
    return max(1, round(density * numel))


@dataclass(frozen=True)
class TopK(Codec):
    """The share `density` of the elements that is largest in magnitude."""

    density: float

    name = "topk"
    contractive = True

    def payload_nbytes(self, numel: int) -> int:
        """4 k + 4 ceil(n / 65536)."""
        return 4 * kept(self.density, numel) + 4 * -(-numel // BLOCK)

    def encode(self, x: Tensor, payload: Tensor, seed: int, error: Tensor | None = None) -> None:
        """Select, gather, round; the error is x less what was rounded, where it was selected."""
        values, counts, places = self._fields(payload, x.numel())
        index = largest(x, values.numel())
        selected = x.index_select(0, index)
        finite = torch.finfo(torch.bfloat16).max  # what rounds to more is sent as that, so that the error stays finite
        values.copy_(torch.where(selected.isinf(), selected, selected.clamp(-finite, finite)))
        split_index(index, counts, places)
        if error is not None:
            if error is not x:
                error.copy_(x)
            error.index_add_(0, index, values.float(), alpha=-1)  # NaN where x is not finite

    def decode_add(self, payload: Tensor, out: Tensor, seed: int) -> None:
        """Widen and scatter; indices are distinct."""
        values, counts, places = self._fields(payload, out.numel())
        out.index_add_(0, join_index(counts, places), values.float())

    def _fields(self, payload: Tensor, numel: int) -> tuple[Tensor, Tensor, Tensor]:
        k, blocks = kept(self.density, numel), -(-numel // BLOCK)
        counts, values, places = payload.split([4 * blocks, 2 * k, 2 * k])
        return values.view(torch.bfloat16), counts.view(torch.int32), places.view(torch.int16)


def split_index(index: Tensor, counts: Tensor, places: Tensor) -> None:
    """Write ascending indices (int64) as `counts` per block (int32) and `places` in the block (uint16 in the bits of int16)."""
    edges = torch.arange(1, counts.numel() + 1, device=index.device) * BLOCK
    ends = torch.searchsorted(index, edges)
    counts.copy_(ends.diff(prepend=ends.new_zeros(1)))
    places.copy_(index & (BLOCK - 1))  # wraps above 32767, undone by the mask in join_index


def join_index(counts: Tensor, places: Tensor) -> Tensor:
    """Inverse of `split_index`: int64 indices."""
    starts = torch.arange(counts.numel(), device=counts.device) * BLOCK
    return (places.long() & (BLOCK - 1)).add_(starts.repeat_interleave(counts))


def largest(x: Tensor, k: int) -> Tensor:
    """Return the ascending indices (int64, shape (k,)) of the k largest magnitudes; ties go to the lowest index."""
    if bits.on_cpu(x):
        return torch.from_numpy(_largest_numpy(x.numpy().view(np.int32), k))
    return _largest_torch(x, k)


def _largest_torch(x: Tensor, k: int) -> Tensor:
    magnitudes = x.view(torch.int32) & _MAGNITUDE
    threshold = magnitudes.topk(k).values[-1]
    above = (magnitudes > threshold).nonzero().flatten()
    ties = (magnitudes == threshold).nonzero().flatten()[: k - above.numel()]
    return torch.cat([above, ties]).sort().values


def _largest_numpy(x: np.ndarray, k: int) -> np.ndarray:
    """Collect candidates above a threshold guessed from a sample, and select exactly among them.

    If at least k magnitudes reach the guess, the k largest are among the candidates, whatever the guess: it decides the
    speed, never the result. Too high a guess is lowered; the last one, 1, takes all that is not zero, and zeros fill what is
    missing.
    """
    n = len(x)
    size = min(n, max(n // 16, 1 << 12), _SAMPLE)
    sample = x[:: n // size] & _MAGNITUDE
    size = len(sample)
    expected = k / n * size
    rank = expected + 4 * math.sqrt(expected) + 4  # four standard deviations: about one guess in 30,000 is too high
    candidates = np.empty(0, np.int64)
    while len(candidates) < k:
        guess = 1 if rank >= size else max(1, int(np.partition(sample, size - int(rank) - 1)[size - int(rank) - 1]))
        candidates = _reaching(x, guess)
        if guess == 1:
            break
        rank *= 4
    if len(candidates) < k:
        zeros = _first_zeros(x, k - len(candidates))
        return np.sort(np.concatenate([candidates, zeros]))
    if len(candidates) == k:
        return candidates
    magnitudes = x[candidates] & _MAGNITUDE
    threshold = np.partition(magnitudes, len(magnitudes) - k)[len(magnitudes) - k]
    keep = magnitudes > threshold
    keep[np.flatnonzero(magnitudes == threshold)[: k - np.count_nonzero(keep)]] = True
    return candidates[keep]


def _reaching(x: np.ndarray, guess: int) -> np.ndarray:
    """Ascending indices of the magnitudes of at least `guess`."""
    found = []
    magnitudes, mask = np.empty(min(len(x), BLOCK), np.int32), np.empty(min(len(x), BLOCK), bool)
    for start in range(0, len(x), BLOCK):
        part = x[start : start + BLOCK]
        m = len(part)
        np.bitwise_and(part, _MAGNITUDE, out=magnitudes[:m])
        np.greater_equal(magnitudes[:m], guess, out=mask[:m])
        found.append(np.flatnonzero(mask[:m]) + start)
    return np.concatenate(found)


def _first_zeros(x: np.ndarray, count: int) -> np.ndarray:
    """The `count` lowest indices of zeros."""
    found, start = [], 0
    while count > 0:
        part = np.flatnonzero((x[start : start + BLOCK] & _MAGNITUDE) == 0)[:count] + start
        found.append(part)
        count, start = count - len(part), start + BLOCK
    return np.concatenate(found)
