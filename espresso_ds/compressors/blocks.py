"""Blocks of 4096 elements with a scale each: what the plain torch code of the codecs for them has in common."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 12


def count(numel: int) -> int:
    """How many blocks `numel` elements make; the last one may be shorter."""
    return -(-numel // BLOCK)


def lengths(numel: int, like: Tensor) -> Tensor:
    """Elements in each block: int64, shape (count(numel),), on the device of `like`."""
    starts = torch.arange(0, numel, BLOCK, device=like.device)
    return (numel - starts).clamp(max=BLOCK)


def rows(x: Tensor, residual: Tensor | None) -> Tensor:
    """p = x + residual, a block per row, the last one filled up with zeros: float32, shape (count(n), BLOCK)."""
    p = x if residual is None else x + residual
    return torch.nn.functional.pad(p, (0, -x.numel() % BLOCK)).view(-1, BLOCK)


def keep(error: Tensor, kept: Tensor) -> None:
    """Write `error` (float32, shape (blocks, BLOCK)) into `kept` (float32 or bfloat16, shape (n,)): finite, whatever comes.

    Of a block that has an error which is not finite, zeros are kept.
    """
    largest = torch.finfo(kept.dtype).max  # what rounds to more would be infinite in bfloat16
    sound = error.isfinite().all(1, keepdim=True)
    kept.copy_(torch.where(sound, error, 0.0).clamp(-largest, largest).view(-1)[: kept.numel()])
