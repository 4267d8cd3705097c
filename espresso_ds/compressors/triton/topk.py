"""Kernels of TopK, TopK by sampled threshold and DGC; the references are of the same names in `compressors/topk.py`.

A guess from a sample, worked out on the device, decides what is listed: one kernel counts what is above it, tile by tile, one
writes p to `kept` and the list in ascending order. Where the list is longer than k, torch.topk cuts it to the k largest: they
are in it whatever the guess, so the same are sent as by the reference.

The host waits for the device once in an encoding, for the length of the list; in exact selection again after each guess that
was too high. All else is queued on the current stream. Scratch of 12 bytes an element listed, usually 1.1 to 1.5 k of them,
comes from torch's caching allocator.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..threshold import INFINITE, MAGNITUDE, positions, sampling
from ..topk import BLOCK, split_index
from .common import EXACT, bits, clamp_to_bfloat16, from_bfloat16, is_finite, load_memory, load_sum, store_kept, to_bfloat16

_TILE = 1 << 12
_ENTRIES = 1 << 10
_MAGNITUDE = tl.constexpr(MAGNITUDE)


def topk_encode(x: Tensor, residual: Tensor | None, kept: Tensor | None, payload: Tensor, k: int, exact: bool) -> None:
    """Send the k largest of p = x + residual: exactly those, or those that reach a guess, at most k."""
    _encode(x, None, None, residual, kept, payload, k, exact, 0.0, 0.0)


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
    """Send about the k largest of p = residual + u', u' = momentum * velocity + scale * x; clear u' where it was sent."""
    _encode(x, velocity, velocity_kept, residual, kept, payload, k, False, momentum, scale)


def topk_decode_sum(rows: Tensor, out: Tensor, k: int, add: bool) -> None:
    """Write the sum of decoded `rows` (uint8, (count, payload bytes or more)) to `out`, in row order; `add` to what is there.

    Entries past the ends of `out` or of a payload are left out; the reference raises for them, here the host would have to wait.
    """
    blocks = triton.cdiv(out.numel(), BLOCK)
    if not add:
        out.zero_()
    if blocks == 0 or len(rows) == 0:
        return
    counts = rows[:, : 4 * blocks].reshape(-1).view(torch.int32).view(-1, blocks)
    ends = counts.cumsum(1)
    with torch.cuda.device_of(out):
        _scatter[blocks,](
            rows, len(rows), rows.stride(0), ends - counts, ends, out, out.numel(), blocks, k, BLOCK=BLOCK, ENTRIES=_ENTRIES
        )


def _encode(
    x: Tensor,
    velocity: Tensor | None,
    velocity_kept: Tensor | None,
    residual: Tensor | None,
    kept: Tensor | None,
    payload: Tensor,
    k: int,
    exact: bool,
    momentum: float,
    scale: float,
) -> None:
    n = x.numel()
    if n == 0:
        return
    form = x, bits(velocity), bits(residual), momentum, scale, n
    tiles = triton.cdiv(n, _TILE)
    counts = x.new_empty((2, tiles), dtype=torch.int32)
    size, rank = sampling(n, k, exact)
    sample = _sample(x, velocity, residual, momentum, scale, size)
    with torch.cuda.device_of(x):
        while True:
            low = sample.topk(rank).values[-1:].clamp(1, INFINITE) - 1 if rank <= size else torch.zeros_like(sample[:1])
            _count[tiles,](*form, low, counts, TILE=_TILE, **EXACT)
            ends = counts.cumsum(1)
            above = int(ends[0, -1])  # the host waits here
            if not exact or above >= k or rank > size:
                break
            rank *= 8
        ties = max(0, k - above) if exact else 0  # none, unless `low` is 0: then zeros fill up
        index, p = x.new_empty(above + ties, dtype=torch.int64), x.new_empty(above + ties)
        _list[tiles,](*form, low, ends - counts, ties, bits(velocity_kept), bits(kept), index, p, TILE=_TILE, **EXACT)
        if len(p) > k:
            chosen = _largest(p, k)
            index, p = index[chosen], p[chosen]
        _send(index, p, bits(velocity_kept), bits(kept), payload, k, n)


def _sample(x: Tensor, velocity: Tensor | None, residual: Tensor | None, momentum: float, scale: float, size: int) -> Tensor:
    """Magnitudes (int32, shape (size,)) of elements of p, in the arithmetic of the reference."""
    at = positions(x.numel(), size, x.device)
    p = x[at]
    if velocity is not None:
        p = velocity[at].float() * momentum + p * scale
    if residual is not None:
        p = p + residual[at]
    return p.view(torch.int32) & MAGNITUDE


def _largest(p: Tensor, k: int) -> Tensor:
    """Ascending indices of the k largest magnitudes, ties to the lowest, as `threshold.first_largest` but without a wait."""
    magnitudes = p.view(torch.int32) & MAGNITUDE
    threshold = magnitudes.topk(k, sorted=False).values.amin()
    above, ties = magnitudes > threshold, magnitudes == threshold
    chosen = above | (ties & (ties.cumsum(0) <= k - above.sum()))
    return torch.searchsorted(chosen.cumsum(0), torch.arange(1, k + 1, device=p.device))


def _send(
    index: Tensor, p: Tensor, velocity_kept: Tensor | None, kept: Tensor | None, payload: Tensor, k: int, numel: int
) -> None:
    """Write the payload of elements `index` (int64, ascending, at most k), and what is kept of them."""
    number, head = len(p), 4 * triton.cdiv(numel, BLOCK)
    values, places = payload[head : head + 4 * k].view(torch.int16).split(k)
    split_index(index, payload[:head].view(torch.int32), places[:number])
    values[number:] = 0
    places[number:] = 0
    if number:
        _round[triton.cdiv(number, _ENTRIES),](index, p, velocity_kept, kept, values, number, ENTRIES=_ENTRIES, **EXACT)


@triton.jit
def _load(
    x: tl.tensor,
    velocity: tl.tensor,
    residual: tl.tensor,
    momentum: tl.tensor,
    scale: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """Elements `at` of u' (0.0 without a velocity) and p."""
    if velocity is None:
        return tl.zeros_like(at).to(tl.float32), load_sum(x, residual, at, inside)
    else:
        turned = load_memory(velocity, at, inside) * momentum + tl.load(x + at, mask=inside, other=0.0) * scale
        p = turned
        if residual is not None:
            p += load_memory(residual, at, inside)
        return turned, p


@triton.jit
def _count(
    x: tl.tensor,
    velocity: tl.tensor,
    residual: tl.tensor,
    momentum: tl.tensor,
    scale: tl.tensor,
    n: tl.tensor,
    low: tl.tensor,
    counts: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """Count the magnitudes above `low` and those equal to it: rows of `counts` (int32, shape (2, tiles))."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    _, p = _load(x, velocity, residual, momentum, scale, at, at < n)
    magnitude = p.to(tl.int32, bitcast=True) & _MAGNITUDE
    floor = tl.load(low)
    tl.store(counts + tl.program_id(0), tl.sum(((magnitude > floor) & (at < n)).to(tl.int32)))
    tl.store(counts + tl.num_programs(0) + tl.program_id(0), tl.sum(((magnitude == floor) & (at < n)).to(tl.int32)))


@triton.jit
def _list(
    x: tl.tensor,
    velocity: tl.tensor,
    residual: tl.tensor,
    momentum: tl.tensor,
    scale: tl.tensor,
    n: tl.tensor,
    low: tl.tensor,
    starts: tl.tensor,
    ties: tl.tensor,
    velocity_kept: tl.tensor,
    kept: tl.tensor,
    index: tl.tensor,
    values: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """Write p and u' to what is kept, and list what is above `low` and the first `ties` of what is equal to it.

    `starts` (int64, shape (2, tiles)) says how many of both kinds there are in the tiles before.
    """
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    turned, p = _load(x, velocity, residual, momentum, scale, at, at < n)
    magnitude = p.to(tl.int32, bitcast=True) & _MAGNITUDE
    floor = tl.load(low)
    above_before = tl.load(starts + tl.program_id(0))
    ties_before = tl.load(starts + tl.num_programs(0) + tl.program_id(0))
    tie = (magnitude == floor) & (at < n)
    tie = tie & (ties_before + _rank(tie) < ties)
    taken = ((magnitude > floor) & (at < n)) | tie
    place = above_before + tl.minimum(ties_before, ties) + _rank(taken)
    tl.store(index + place, at, mask=taken)
    tl.store(values + place, p, mask=taken)
    if kept is not None:
        store_kept(kept, at, p, at < n)
    if velocity_kept is not None:
        store_kept(velocity_kept, at, turned, at < n)


@triton.jit
def _rank(chosen: tl.tensor) -> tl.tensor:
    """How many are chosen before each element of a tile."""
    number = chosen.to(tl.int32)
    return tl.cumsum(number, 0) - number


@triton.jit
def _round(
    index: tl.tensor,
    values: tl.tensor,
    velocity_kept: tl.tensor,
    kept: tl.tensor,
    sent: tl.tensor,
    number: tl.tensor,
    ENTRIES: tl.constexpr,
) -> None:
    """Round listed values to `sent` (bfloat16 as int16), keep what was rounded off, and clear u' there."""
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    inside = entry < number
    at = tl.load(index + entry, mask=inside, other=0)
    p = tl.load(values + entry, mask=inside, other=0.0)
    rounded = to_bfloat16(tl.where(is_finite(p), clamp_to_bfloat16(p), p))
    rounded = tl.where(p != p, tl.full([ENTRIES], 0x7FC0, tl.int16), rounded)  # one NaN stands for all
    tl.store(sent + entry, rounded, mask=inside)
    if kept is not None:
        store_kept(kept, at, p - from_bfloat16(rounded), inside)
    if velocity_kept is not None:
        store_kept(velocity_kept, at, tl.zeros([ENTRIES], tl.float32), inside)


@triton.jit
def _scatter(
    rows: tl.tensor,
    count: tl.tensor,
    stride: tl.tensor,
    starts: tl.tensor,
    ends: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    blocks: tl.tensor,
    k: tl.tensor,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
) -> None:
    """Add what the rows hold for this program's block; their entries `starts` to `ends` (int64, shape (count, blocks))."""
    block = tl.program_id(0).to(tl.int64)
    for row in range(count):
        payload = rows + tl.cast(row, tl.int64) * stride
        values = (payload + 4 * tl.cast(blocks, tl.int64)).to(tl.pointer_type(tl.int16))
        start = tl.maximum(tl.load(starts + row * blocks + block), 0)
        end = tl.minimum(tl.load(ends + row * blocks + block), k)
        for first in range(start, end, ENTRIES):
            entry = first + tl.arange(0, ENTRIES)
            place = tl.load(values + k + entry, mask=entry < end, other=0).to(tl.int64) & (BLOCK - 1)
            at = block * BLOCK + place
            inside = (entry < end) & (at < n)
            value = from_bfloat16(tl.load(values + entry, mask=inside, other=0))
            tl.store(out + at, tl.load(out + at, mask=inside, other=0.0) + value, mask=inside)
        tl.debug_barrier()  # the next row adds to elements that other threads have written
