"""Kernels of EF-SignSGD and 1-bit: one program per block of 4096 elements, which it reads and writes once.

Both are signs that stand for one of two values per block, so they share their kernels: in the payload of EF-SignSGD there are
no lower values, they are the upper ones negated. Means are taken in float64 as in the reference, in another order, so that they
may differ from it in the last bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import BLOCK, count
from .common import EXACT, bits, floats, load_sum, pack, store_kept, unpack


def sign_encode(x: Tensor, residual: Tensor | None, kept: Tensor | None, payload: Tensor) -> None:
    """Write scales and sign bits of p = x + residual; arguments as `Codec.encode` takes them."""
    _encode_all(x, residual, kept, payload, two_means=False)


def onebit_encode(x: Tensor, residual: Tensor | None, kept: Tensor | None, payload: Tensor) -> None:
    """Write lower means, upper means and sign bits of p = x + residual; arguments as `Codec.encode` takes them."""
    _encode_all(x, residual, kept, payload, two_means=True)


def sign_decode_sum(rows: Tensor, out: Tensor, add: bool) -> None:
    """Write the sum of decoded `rows` (uint8, (count, payload bytes or more)) to `out`, in row order; `add` to what is there."""
    _decode_all(rows, out, add, two_means=False)


def onebit_decode_sum(rows: Tensor, out: Tensor, add: bool) -> None:
    """As `sign_decode_sum`, for the payloads of `onebit_encode`."""
    _decode_all(rows, out, add, two_means=True)


def _encode_all(x: Tensor, residual: Tensor | None, kept: Tensor | None, payload: Tensor, two_means: bool) -> None:
    blocks = count(x.numel())
    if blocks:
        with torch.cuda.device_of(x):
            _encode[blocks,](x, bits(residual), bits(kept), payload, x.numel(), blocks, TWO_MEANS=two_means, BLOCK=BLOCK, **EXACT)


def _decode_all(rows: Tensor, out: Tensor, add: bool, two_means: bool) -> None:
    blocks = count(out.numel())
    if blocks:
        with torch.cuda.device_of(out):
            _decode[blocks,](
                rows, len(rows), rows.stride(0), out, out.numel(), blocks, ADD=add, TWO_MEANS=two_means, BLOCK=BLOCK, **EXACT
            )


@triton.jit
def _encode(
    x: tl.tensor,
    residual: tl.tensor,
    kept: tl.tensor,
    payload: tl.tensor,
    n: tl.tensor,
    blocks: tl.tensor,
    TWO_MEANS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    p = load_sum(x, residual, at, at < n)
    negative = p.to(tl.int32, bitcast=True) < 0  # not past the end, where p is 0.0
    number = tl.minimum(n - block * BLOCK, BLOCK)
    values = floats(payload)
    if TWO_MEANS:
        below = tl.sum(negative.to(tl.int32))
        lower = _mean(tl.where(negative, p, 0.0), below)
        upper = _mean(tl.where(negative, 0.0, p), number - below)
        tl.store(values + block, lower)
        tl.store(values + blocks + block, upper)
        signs = payload + 8 * tl.cast(blocks, tl.int64)
    else:
        upper = _mean(tl.abs(p), number)
        lower = _negated(upper)
        tl.store(values + block, upper)
        signs = payload + 4 * tl.cast(blocks, tl.int64)
    byte = block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    tl.store(signs + byte, pack(negative.to(tl.int32), 1), mask=byte * 8 < n)
    if kept is not None:
        store_kept(kept, at, p - tl.where(negative, lower, upper), at < n)


@triton.jit
def _mean(values: tl.tensor, number: tl.tensor) -> tl.tensor:
    """Sum of all `values`, by `number`; zero for none."""
    return (tl.sum(values.to(tl.float64)) / tl.maximum(number, 1).to(tl.float64)).to(tl.float32)


@triton.jit
def _negated(x: tl.tensor) -> tl.tensor:
    """-x, and -0.0 for 0.0: the minus of Triton 3.7 takes x from 0.0."""
    return x * -1.0


@triton.jit
def _decode(
    rows: tl.tensor,
    count: tl.tensor,
    stride: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    blocks: tl.tensor,
    ADD: tl.constexpr,
    TWO_MEANS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    byte = block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    total = tl.load(out + at, mask=at < n) if ADD else tl.zeros([BLOCK], tl.float32)
    for row in range(count):
        payload = rows + tl.cast(row, tl.int64) * stride
        values = floats(payload)
        if TWO_MEANS:
            lower = tl.load(values + block)
            upper = tl.load(values + blocks + block)
            signs = payload + 8 * tl.cast(blocks, tl.int64)
        else:
            upper = tl.load(values + block)
            lower = _negated(upper)
            signs = payload + 4 * tl.cast(blocks, tl.int64)
        negative = unpack(tl.load(signs + byte, mask=byte * 8 < n, other=0), 1) != 0
        total += tl.where(negative, lower, upper)
    tl.store(out + at, total, mask=at < n)
