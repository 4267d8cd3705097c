"""The same algorithms as one would write them in torch at first: what the kernels are compared with.

Each rendering adds the residual, encodes, packs what is sent, and keeps the residual, on float32 tensors of one dimension whose
length is a multiple of 8; each decoding adds one payload to a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Payload = tuple[Tensor, ...]


@dataclass(frozen=True)
class Plain:
    """`encode(g, r, u)` changes the residual `r` (and the momentum `u`) in place; `decode(payload, out)` adds to `out`."""

    encode: Callable[[Tensor, Tensor, Tensor], Payload]
    decode: Callable[[Payload, Tensor], object]


def _pack(levels: Tensor, bits: int) -> Tensor:
    lanes = 8 // bits
    shifts = torch.arange(lanes, dtype=torch.uint8) * bits
    return (levels.view(-1, lanes) << shifts).sum(1, dtype=torch.uint8)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(8 // bits, dtype=torch.uint8) * bits
    return ((packed[:, None] >> shifts) & (2**bits - 1)).view(-1)


def sign() -> Plain:
    """EF-SignSGD with one scale."""

    def encode(g: Tensor, r: Tensor, u: Tensor) -> Payload:
        p = g + r
        scale = p.abs().mean()
        negative = p < 0
        r.copy_(p - torch.where(negative, -scale, scale))
        return _pack(negative.to(torch.uint8), 1), scale

    def decode(payload: Payload, out: Tensor) -> None:
        packed, scale = payload
        out.add_(torch.where(_unpack(packed, 1).bool(), -scale, scale))

    return Plain(encode, decode)


def quantize(bits: int) -> Plain:
    """Min-max quantization with one range."""

    def encode(g: Tensor, r: Tensor, u: Tensor) -> Payload:
        p = g + r
        low, high = p.min(), p.max()
        step = (high - low) / (2**bits - 1)
        levels = ((p - low) / step).round()
        r.copy_(p - (levels * step + low))
        return _pack(levels.to(torch.uint8), bits), step, low

    def decode(payload: Payload, out: Tensor) -> None:
        packed, step, low = payload
        out.add_(_unpack(packed, bits).float() * step + low)

    return Plain(encode, decode)


def _send(p: Tensor, r: Tensor, index: Tensor) -> Payload:
    values = p[index]
    r.copy_(p)
    r[index] = 0.0
    return values, index


def _scatter(payload: Payload, out: Tensor) -> None:
    values, index = payload
    out.index_add_(0, index, values)


def topk(density: float) -> Plain:
    """The largest, by torch.topk."""

    def encode(g: Tensor, r: Tensor, u: Tensor) -> Payload:
        p = g + r
        return _send(p, r, p.abs().topk(max(1, round(density * p.numel()))).indices)

    return Plain(encode, _scatter)


def _by_sample(p: Tensor, density: float) -> Tensor:
    """Indices at or above a threshold that a random hundredth of the elements suggests, capped at k."""
    k, magnitudes = max(1, round(density * p.numel())), p.abs()
    sample = magnitudes[torch.randint(p.numel(), (max(1000, p.numel() // 100),))]
    threshold = sample.topk(max(1, round(density * sample.numel()))).values[-1]
    index = (magnitudes >= threshold).nonzero().view(-1)
    return index if index.numel() <= k else index[magnitudes[index].topk(k).indices]


def topk_sampled(density: float) -> Plain:
    """The largest, by a sampled threshold."""

    def encode(g: Tensor, r: Tensor, u: Tensor) -> Payload:
        p = g + r
        return _send(p, r, _by_sample(p, density))

    return Plain(encode, _scatter)


def dgc(density: float, momentum: float = 0.9) -> Plain:
    """Momentum correction, then the largest by a sampled threshold, then masking."""

    def encode(g: Tensor, r: Tensor, u: Tensor) -> Payload:
        u.mul_(momentum).add_(g)
        p = r + u
        payload = _send(p, r, _by_sample(p, density))
        u[payload[1]] = 0.0
        return payload

    return Plain(encode, _scatter)
