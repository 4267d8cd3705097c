"""Kernels of uniform quantization: one program per block of 4096 elements, which it reads and writes once.

A block's range, its grid, its levels and their bits are worked out in registers, in the arithmetic of the reference: all bytes
are the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import BLOCK, count
from .common import EXACT, floats, is_finite, load_sum, pack, store_kept, unpack
from .common import bits as raw

_FP32 = torch.finfo(torch.float32)
_TINY = tl.constexpr(_FP32.tiny)


def quantize_encode(x: Tensor, residual: Tensor | None, kept: Tensor | None, payload: Tensor, bits: int, symmetric: bool) -> None:
    """Write grids and levels of p = x + residual; arguments as `Codec.encode` takes them, 1 to 8 `bits`."""
    n = x.numel()
    if n == 0:
        return
    grid = _grid(bits, symmetric)
    limit = 0.9 * _FP32.max / max(1.0, grid["MIDDLE"] if symmetric else grid["TOP"])
    with torch.cuda.device_of(x):
        _encode[count(n),](x, raw(residual), raw(kept), payload, n, limit, BITS=bits, **grid, BLOCK=BLOCK, **EXACT)


def quantize_decode_sum(rows: Tensor, out: Tensor, bits: int, symmetric: bool, add: bool) -> None:
    """Write the sum of decoded `rows` (uint8, (count, payload bytes or more)) to `out`, in row order; `add` to what is there."""
    n = out.numel()
    if n == 0:
        return
    grid = _grid(bits, symmetric)
    with torch.cuda.device_of(out):
        _decode[count(n),](rows, len(rows), rows.stride(0), out, n, BITS=bits, **grid, ADD=add, BLOCK=BLOCK, **EXACT)


def _grid(bits: int, symmetric: bool) -> dict[str, float]:
    """The top level, and the one that stands for zero on the symmetric grid; negative if each block has its own."""
    middle = (1 << (bits - 1)) - 1 if bits > 1 else 0.5
    return {"TOP": 2.0 * middle, "MIDDLE": float(middle)} if symmetric else {"TOP": 2.0**bits - 1, "MIDDLE": -1.0}


@triton.jit
def _encode(
    x: tl.tensor,
    residual: tl.tensor,
    kept: tl.tensor,
    payload: tl.tensor,
    n: tl.tensor,
    limit: tl.tensor,
    BITS: tl.constexpr,
    TOP: tl.constexpr,
    MIDDLE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    p = load_sum(x, residual, at, at < n)
    finite = tl.min(is_finite(p).to(tl.int32)) != 0
    p = tl.where(finite, p, 0.0)
    steps, zeros, packed = _fields(payload, n, MIDDLE, BLOCK)
    if MIDDLE < 0:
        lo = tl.minimum(tl.min(p), 0.0)
        hi = tl.maximum(tl.max(p), 0.0)
        step = _usable(tl.div_rn(hi, TOP) - tl.div_rn(lo, TOP), limit)
        zero = tl.where(step == 0, 0.0, _nearest(tl.div_rn(0.0 - lo, step), TOP))
        tl.store(zeros + block, zero)
    else:
        step = _usable(tl.div_rn(tl.max(tl.abs(p)), 1.0 if MIDDLE < 1 else MIDDLE), limit)
        zero = MIDDLE
    tl.store(steps + block, tl.where(finite, step, float("nan")))
    inverse = tl.where(step == 0, 0.0, tl.div_rn(1.0, step))
    level = _nearest(p * inverse + zero, TOP)
    _store_levels(packed, tl.where(at < n, level, 0.0).to(tl.int32), block, n, BITS, BLOCK)
    if kept is not None:
        store_kept(kept, at, p - (level - zero) * step, at < n)


@triton.jit
def _fields(
    payload: tl.tensor, n: tl.tensor, MIDDLE: tl.constexpr, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Where steps, zeros and packed levels start; a symmetric grid has no zeros."""
    blocks = tl.cdiv(tl.cast(n, tl.int64), BLOCK)
    steps = floats(payload)
    zeros = steps + blocks
    return steps, zeros, payload + (8 if MIDDLE < 0 else 4) * blocks


@triton.jit
def _usable(step: tl.tensor, limit: tl.tensor) -> tl.tensor:
    """Steps below the normal range of float32 become zero, those above `limit` are clipped to it."""
    return tl.where(step < _TINY, 0.0, tl.minimum(step, limit))


@triton.jit
def _nearest(x: tl.tensor, TOP: tl.constexpr) -> tl.tensor:
    """The nearest of the levels 0..TOP, ties to even: next to 2**23 float32 has no room for fractions."""
    return tl.minimum(tl.maximum(x, 0.0), TOP) + 8388608.0 - 8388608.0


@triton.jit
def _store_levels(
    packed: tl.tensor, level: tl.tensor, block: tl.tensor, n: tl.tensor, BITS: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Write the levels (int32) of a block, plane by plane: a width that is no power of two is a sum of them, widest first."""
    for i in tl.static_range(4):
        if BITS & (8 >> i):
            at, inside = _plane(block, n, BITS, 8 >> i, BLOCK)
            part = (level >> (BITS & -(16 >> i))) & ((1 << (8 >> i)) - 1)
            tl.store(packed + at, pack(part, 8 >> i), mask=inside)


@triton.jit
def _load_levels(packed: tl.tensor, block: tl.tensor, n: tl.tensor, BITS: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """Inverse of `_store_levels`; zero past the end."""
    level = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(4):
        if BITS & (8 >> i):
            at, inside = _plane(block, n, BITS, 8 >> i, BLOCK)
            part = unpack(tl.load(packed + at, mask=inside, other=0), 8 >> i)
            level |= part << (BITS & -(16 >> i))
    return level


@triton.jit
def _plane(
    block: tl.tensor, n: tl.tensor, BITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Where the bytes of a block lie in the plane of `WIDTH`, and which of them exist; wider planes come before it."""
    groups = tl.cdiv(tl.cast(n, tl.int64), 8)
    byte = block * (BLOCK // 8 * WIDTH) + tl.arange(0, BLOCK // 8 * WIDTH)
    return groups * (BITS & -(2 * WIDTH)) + byte, byte < groups * WIDTH


@triton.jit
def _decode(
    rows: tl.tensor,
    count: tl.tensor,
    stride: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    BITS: tl.constexpr,
    TOP: tl.constexpr,
    MIDDLE: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(out + at, mask=at < n) if ADD else tl.zeros([BLOCK], tl.float32)
    for row in range(count):
        steps, zeros, packed = _fields(rows + tl.cast(row, tl.int64) * stride, n, MIDDLE, BLOCK)
        zero = tl.load(zeros + block) if MIDDLE < 0 else MIDDLE
        total += (_load_levels(packed, block, n, BITS, BLOCK).to(tl.float32) - zero) * tl.load(steps + block)
    tl.store(out + at, total, mask=at < n)
