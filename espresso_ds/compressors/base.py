"""The one contract of the codec layer: a tensor goes in, one flat buffer of bytes of known size comes out.

Schemes see only bytes and never ask which codec they carry. Codecs hold no state: the memory of error feedback belongs to the
caller (`espresso_ds.feedback`), and randomness comes from the `seed` that the caller passes.

Whoever encodes passes the residual along, so that one pass over memory adds it, encodes, and leaves what encoding has dropped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .backend import cpu_kernel
from .parts import Parts

ALIGNMENT = 16
"""Rows of payload buffers start at multiples of this many bytes, so that any slice can be viewed as any dtype."""


class Codec(ABC):
    """A compression algorithm with its parameters fixed. Instances are immutable and safe to use from several threads."""

    name: ClassVar[str]
    unbiased: bool = False
    """Whether decode(encode(x)) is x in the mean over seeds."""
    sum_dtype: torch.dtype | None = None
    """Set if payloads viewed as this dtype may be added up and then decoded as one (cast, RandomK with a shared seed)."""
    shared_seed: bool = False
    """Whether all ranks must encode with one seed. Others draw better apart: then their errors average out."""

    parts_kernel: ClassVar[str | None] = None
    """Name of the kernel that encodes, where there is one that reads `Parts` too (the native ones do)."""

    @property
    def contractive(self) -> bool:
        """Whether |x - decode(encode(x))| < |x| (in the mean over seeds), so that error feedback converges around it."""
        return False

    @property
    def votes(self) -> bool:
        """Whether decoding needs the payloads of all ranks at once (a majority), so that no partial sum may be made."""
        return False

    def at(self, step: int) -> Codec:
        """The codec of an optimizer step, counted from 0; another than this one while a density warms up."""
        return self

    def for_shape(self, shape: Sequence[int]) -> Codec:
        """The codec for tensors of a shape that has a meaning, as activations have; gradients are encoded without one."""
        return self

    @abstractmethod
    def payload_nbytes(self, numel: int) -> int:
        """Size in bytes of the payload of `numel` elements, fixed by `numel` alone; 0 for none."""

    @abstractmethod
    def encode(self, x: Tensor, payload: Tensor, seed: int, residual: Tensor | None = None, kept: Tensor | None = None) -> None:
        """Compress p = x + residual into `payload`, and leave p - decode(payload) in `kept`.

        Args:
            x: float32, shape (n,), contiguous, at any address; not changed.
            payload: uint8, shape (payload_nbytes(n),), contiguous, aligned to ALIGNMENT, same device; overwritten whole.
            seed: below 2**63, different for every step and unit; deterministic codecs ignore it.
            residual: float32 or bfloat16, shape (n,), contiguous, finite; None counts as zeros.
            kept: like `residual`, and may be `residual` itself; None if nobody wants to know. A bfloat16 one is rounded to
                nearest even.

        NaN and Inf in p are never hidden: if any element is not finite, decoding gives at least one value that is not finite.
        All of `kept` is finite even then, but otherwise unspecified: who may skip a step keeps the old residual.
        """

    def kernel_arguments(self, seed: int) -> tuple[object, ...]:
        """What `parts_kernel` is given last."""
        return ()

    def encode_parts(
        self, x: Parts, payload: Tensor, seed: int, residual: Tensor | None = None, kept: Tensor | None = None
    ) -> None:
        """As `encode`, with the same bytes. Where `reads_parts` says no, elements are brought together first."""
        if fused := self._parts_encoder():
            fused(x, residual, kept, payload, *self.kernel_arguments(seed))
        else:
            self.encode(x.gather(), payload, seed, residual, kept)

    @property
    def reads_parts(self) -> bool:
        """Whether `encode_parts` reads elements where they are."""
        return self._parts_encoder() is not None

    def _parts_encoder(self) -> Callable[..., Any] | None:
        return cpu_kernel(self.parts_kernel) if self.parts_kernel is not None else None

    @abstractmethod
    def decode_add(self, payload: Tensor, out: Tensor, seed: int) -> None:
        """Add the decoded payload to `out` (float32, shape (n,), contiguous); `seed` as given to `encode`."""

    def decode_sum(self, rows: Tensor, out: Tensor, seed: int) -> None:
        """Overwrite `out` by the sum of decoded payloads, in row order from +0.0, so that all ranks get the same bits.

        Args:
            rows: uint8, shape (count, at least payload_nbytes(n)), each row contiguous and aligned; any row stride.
            out: float32, shape (n,), contiguous.
            seed: as given to `encode`, where it is shared.
        """
        out.zero_()
        nbytes = self.payload_nbytes(out.numel())
        for row in rows:
            self.decode_add(row[:nbytes], out, seed)


def padded(nbytes: int) -> int:
    """Round `nbytes` up to the stride of a payload row."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
