"""Two codecs in the plainest torch, for tests of what stands around codecs: nothing is rounded, so all is checked to the bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from espresso_ds.compressors.base import Codec


@dataclass(frozen=True)
class Largest(Codec):
    """The k largest magnitudes as fp32 and int64 indices; with momentum, as the paper on DGC has it."""

    k: int

    name = "largest"
    contractive = True

    def payload_nbytes(self, numel: int) -> int:
        return 12 * min(self.k, numel)

    def encode(self, x: Tensor, payload: Tensor, seed: int, residual: Tensor | None = None, kept: Tensor | None = None) -> None:
        p = x.clone() if residual is None else x + residual
        index, values = self._fields(payload)
        index.copy_(p.abs().topk(index.numel()).indices)
        values.copy_(p[index])
        if kept is not None:
            kept.copy_(p.index_fill_(0, index, 0).nan_to_num())

    def encode_momentum(self, x, velocity, velocity_kept, residual, kept, payload, seed, momentum, scale) -> None:
        u = momentum * velocity.float() + scale * x
        self.encode(u, payload, seed, residual, kept)
        velocity_kept.copy_(u.index_fill_(0, self._fields(payload)[0], 0).nan_to_num())

    def decode_add(self, payload: Tensor, out: Tensor, seed: int) -> None:
        index, values = self._fields(payload)
        out.index_add_(0, index, values)

    def _fields(self, payload: Tensor) -> tuple[Tensor, Tensor]:
        index, values = payload.split([payload.numel() // 3 * 2, payload.numel() // 3])
        return index.view(torch.int64), values.view(torch.float32)


@dataclass(frozen=True)
class FirstHalf(Codec):
    """The first half of the elements. Allocates nothing."""

    name = "first half"
    contractive = True

    def payload_nbytes(self, numel: int) -> int:
        return numel // 2 * 4

    def encode(self, x: Tensor, payload: Tensor, seed: int, residual: Tensor | None = None, kept: Tensor | None = None) -> None:
        sent = payload.view(torch.float32)
        if residual is None:
            sent.copy_(x[: sent.numel()])
            return
        torch.add(x, residual, out=kept)
        sent.copy_(kept[: sent.numel()])
        kept[: sent.numel()].zero_()

    def encode_momentum(self, x, velocity, velocity_kept, residual, kept, payload, seed, momentum, scale) -> None:
        velocity_kept.copy_(velocity).mul_(momentum).add_(x, alpha=scale)
        self.encode(velocity_kept, payload, seed, residual, kept)
        velocity_kept[: x.numel() // 2].zero_()

    def decode_add(self, payload: Tensor, out: Tensor, seed: int) -> None:
        sent = payload.view(torch.float32)
        out[: sent.numel()].add_(sent)
