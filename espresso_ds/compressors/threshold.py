"""A threshold that about k magnitudes reach, guessed from a sample of them (Lin et al., "Deep Gradient Compression", ICLR 2018,
section 5), here a deterministic one, so that the same tensor gives the same payload on every device.

The sample has a run of neighbours from each of many strata of equal length, at a place that a hash of the stratum's number draws:
even over the tensor, and in no step with rows and columns. Neighbours are in one line of the cache, and reaching that is what a
sample costs. It holds about 96 of the k largest, which puts the share that reaches the guess within a tenth or so of that aimed
at; what is too much is selected exactly, so the aim is above k.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

MAGNITUDE = 0x7FFFFFFF
"""All bits of an fp32 but the sign. Magnitudes compare as integers like as floats, and NaN is above Inf."""
INFINITE = 0x7F800000
_MIX = 2654435769, 2246822519
"""Odd, with bits in no order: the first is 2**32 over the golden ratio."""
_HITS, _LEAST, _MOST, _RUN = 96, 512, 16384, 16


@lru_cache(maxsize=4096)
def sampling(numel: int, k: int, exact: bool) -> tuple[int, int]:
    """How many of `numel` elements to sample, and which of them, counted from the largest, is the threshold to select k with.

    Few elements are the sample themselves; else it consists of whole runs.

    Exact selection pays for too high a guess with a second look at the tensor: four standard deviations make that rare. Other
    selection sends less than k then, by a few percent: one and a half do.
    """
    size = min(_MOST, max(_LEAST, min(numel // 16, _HITS * numel // k))) // _RUN * _RUN if numel > _LEAST else numel
    expected = k / numel * size
    deviation = math.sqrt(expected)
    return size, math.ceil(expected + (4 * deviation + 4 if exact else 1.5 * deviation + 1))


def positions(numel: int, size: int, device: torch.device | str = "cpu") -> Tensor:
    """Where the sample of `size` of `numel` elements is: ascending int64, shape (size,). Exact up to 2**46 elements."""
    run = size if size == numel else _RUN
    runs, units = size // run, numel // run
    j = torch.arange(runs, device=device)
    mixed = (j * _MIX[0]) & 0xFFFFFFFF
    hashed = ((mixed ^ mixed >> 16) * _MIX[1]) & 0xFFFFFFFF
    first = (j * ((units << 16) // runs) >> 16) + (hashed * (units // runs) >> 32)
    return (first[:, None] * run + torch.arange(run, device=device)).view(-1)


def reaching(p: Tensor, k: int) -> Tensor:
    """Select about k of the largest magnitudes, never more.

    Returns:
        Ascending indices (int64) of the k largest of all that reaches the guess, ties going to the lowest index; fewer if fewer
        do. The guess is the magnitude of an element unless that is zero, and then all others reach it: if any element is not
        zero, the largest is selected.
    """
    size, rank = sampling(p.numel(), k, exact=False)
    magnitudes = p.view(torch.int32) & MAGNITUDE
    sample = magnitudes[positions(p.numel(), size, p.device)]
    guess = sample.sort(descending=True).values[rank - 1].clamp(1, INFINITE) if rank <= size else 1
    index = (magnitudes >= guess).nonzero().view(-1)
    return index if index.numel() <= k else index[first_largest(magnitudes[index], k)]


def first_largest(magnitudes: Tensor, k: int) -> Tensor:
    """Ascending indices (int64, shape (k,)) of the k largest integers; ties go to the lowest index."""
    threshold = magnitudes.topk(k).values[-1]
    above = (magnitudes > threshold).nonzero().view(-1)
    ties = (magnitudes == threshold).nonzero().view(-1)[: k - above.numel()]
    return torch.cat([above, ties]).sort().values
