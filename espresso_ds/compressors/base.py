"""The one contract of the codec layer: a tensor goes in, one flat buffer of bytes of known size comes out.

Schemes see only bytes and never ask which codec they carry. Codecs hold no state: error feedback is kept around them
(`espresso_ds.feedback`), and randomness comes from the `seed` that the caller passes, equal on all ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

ALIGNMENT = 16
"""Rows of payload buffers start at multiples of this many bytes, so that any slice can be viewed as any dtype."""


class Codec(ABC):
    """A compression algorithm with its parameters fixed. Instances are immutable and safe to use from several threads."""

    name: ClassVar[str]
    contractive: ClassVar[bool]
    """Whether |x - decode(encode(x))| < |x|, so that error feedback converges without further scaling."""
    sum_dtype: torch.dtype | None = None
    """Set if payloads viewed as this dtype may be added up and then decoded as one (cast, RandomK with a shared seed)."""

    @abstractmethod
    def payload_nbytes(self, numel: int) -> int:
        """Size in bytes of the payload of `numel` >= 1 elements, fixed by `numel` alone."""

    @abstractmethod
    def encode(self, x: Tensor, payload: Tensor, seed: int, error: Tensor | None = None) -> None:
        """Compress `x` into `payload`.

        Args:
            x: float32, shape (n,), contiguous; unchanged unless `error is x`.
            payload: uint8, shape (payload_nbytes(n),), contiguous, aligned to ALIGNMENT, same device; overwritten whole.
            seed: equal on all ranks, different for every step and unit; deterministic codecs ignore it.
            error: if given, float32 of shape (n,) that receives x - decode(payload). It may be `x` itself.

        NaN and Inf in `x` are never hidden: if any element is not finite, decoding gives at least one value that is not finite.
        """

    @abstractmethod
    def decode_add(self, payload: Tensor, out: Tensor, seed: int) -> None:
        """Add the decoded payload to `out` (float32, shape (n,), contiguous); `seed` as given to `encode`."""


def padded(nbytes: int) -> int:
    """Round `nbytes` up to the stride of a payload row."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
