"""The seam between codecs and machines: walking a tensor in cache-sized spans, and packing small integers into bits.

Codecs are written once, in torch. What torch does slowly on a CPU (comparing to a mask, packing, table look-up) is done here
by numpy on zero-copy views; other devices take the torch branch. Both branches write the same bytes, so what one device packs
another may unpack.

Bit order: element i of a field of `width` bits lies in byte i * width // 8, lowest bits first (numpy's "little" order). A
width that is not a power of two is the sum of powers of two, one plane each: 5 bits are a plane of 4 and a plane of 1.

Scratch belongs to the thread: codecs run in several threads at once, and fresh pages cost more than the passes over them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 16
"""Elements handled at a time on a CPU: 256 KiB of fp32 and its temporaries stay in a 1 or 2 MiB L2 cache."""

_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_SIGNS = 1.0 - 2.0 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(np.float32)
_thread = threading.local()


def on_cpu(x: Tensor) -> bool:
    """Whether numpy may work on the memory of `x`. Every choice between the two branches is made here."""
    return x.is_cpu


def scratch(x: Tensor, numel: int, dtype: torch.dtype = torch.float32, slot: int = 0) -> Tensor:
    """Uninitialised memory on the device of `x`; on a CPU the thread's own, one buffer per dtype and slot, `numel` <= CHUNK."""
    if not on_cpu(x):
        return x.new_empty(numel, dtype=dtype)
    buffers: dict[tuple[torch.dtype, int], Tensor] = _thread.__dict__.setdefault("buffers", {})
    if (dtype, slot) not in buffers:
        buffers[dtype, slot] = torch.empty(CHUNK, dtype=dtype)
    return buffers[dtype, slot][:numel]


def spans(x: Tensor, start: int = 0, stop: int | None = None) -> Iterator[slice]:
    """Slices of at most CHUNK elements that cover [start, stop) of a CPU tensor; one slice for any other device."""
    stop = x.numel() if stop is None else stop
    step = CHUNK if on_cpu(x) else max(1, stop - start)
    for at in range(start, stop, step):
        yield slice(at, min(at + step, stop))


def packed_nbytes(numel: int, bits: int) -> int:
    """Bytes of `numel` fields of `bits` bits, padded to whole groups of eight fields."""
    return -(-numel // 8) * bits


def planes(packed: Tensor, numel: int, bits: int) -> list[tuple[int, int, Tensor]]:
    """The (shift, width, bytes) of each plane in a buffer of `packed_nbytes(numel, bits)` bytes, lowest bits first."""
    found, shift, at = [], 0, 0
    for width in (8, 4, 2, 1):
        if bits & width:
            size = packed_nbytes(numel, width)
            found.append((shift, width, packed[at : at + size]))
            shift, at = shift + width, at + size
    return found


def pack(levels: Tensor, width: int, out: Tensor) -> None:
    """Pack `levels` (uint8, shape (m,), below 2**width; width 1, 2, 4 or 8) into `out` (uint8, packed_nbytes(m, width))."""
    m = levels.numel()
    if m % 8:
        levels = torch.nn.functional.pad(levels, (0, -m % 8))
    if width == 8:
        out.copy_(levels)
    elif width == 1 and on_cpu(levels):
        out.numpy()[:] = np.packbits(levels.numpy(), bitorder="little")
    else:
        lanes, shift = 8 // width, 8 - width
        words = levels.view(_WORDS[lanes])
        while lanes > 1:  # fold the upper half of the lanes beside the lower half
            words, lanes, shift = words | (words >> shift), lanes // 2, shift * 2
        out.copy_(words)


def unpack(packed: Tensor, width: int, numel: int) -> Tensor:
    """Inverse of `pack`: uint8 of shape (numel,), scratch or a view of `packed` on a CPU."""
    if width == 8:
        return packed[:numel]
    if width == 1 and on_cpu(packed):
        return torch.from_numpy(np.unpackbits(packed.numpy(), count=numel, bitorder="little"))
    lanes = 8 // width
    kind, group = _WORDS[lanes], lanes // 2
    words = scratch(packed, packed.numel(), kind).copy_(packed)
    while group:  # spread `group` lanes to the upper half, and clear what is left of them in the lower
        shift = group * (8 - width)
        keep = sum(((1 << group * width) - 1) << 8 * group * i for i in range(lanes // group))
        moved = torch.bitwise_left_shift(words, shift, out=scratch(packed, packed.numel(), kind, 1))
        words, group = words.bitwise_or_(moved).bitwise_and_(keep), group // 2
    return words.view(torch.uint8)[:numel]


def pack_signs(x: Tensor, out: Tensor) -> None:
    """Write the sign bits of `x` (float32, shape (n,); 1 for negative and for -0.0) into `out` (uint8, packed_nbytes(n, 1))."""
    bits = x.view(torch.int32)
    if on_cpu(x):
        negative = scratch(x, x.numel(), torch.bool).numpy()
        np.less(bits.numpy(), 0, out=negative)
        out.numpy()[:] = np.packbits(negative, bitorder="little")
    else:
        pack((bits < 0).view(torch.uint8), 1, out)


def sign_table(scale: Tensor) -> Tensor:
    """What each byte of packed signs stands for: float32 of shape (256, 8), +scale or -scale; `scale` has shape (1,)."""
    return torch.from_numpy(_SIGNS).to(scale.device) * scale


def unpack_signs(packed: Tensor, table: Tensor, numel: int) -> Tensor:
    """Look up `numel` packed signs in a `sign_table`, eight at a time: float32 of shape (numel,), scratch on a CPU."""
    if not on_cpu(packed):
        return table[packed.long()].view(-1)[:numel]
    out = scratch(packed, packed.numel() * 8)
    # "clip" only spares numpy the range check, which a byte cannot fail, and the buffering that goes with it.
    np.take(table.numpy(), packed.numpy(), axis=0, out=out.numpy().reshape(-1, 8), mode="clip")
    return out[:numel]


def convert(x: Tensor, out: Tensor) -> Tensor:
    """out = x in the dtype of `out`; NaN becomes anything."""
    if on_cpu(x):
        with np.errstate(invalid="ignore"):
            np.copyto(out.numpy(), x.numpy(), casting="unsafe")
    else:
        out.copy_(x)
    return out


def abs_sum(x: Tensor) -> float:
    """Sum of |x| in double precision: infinite or NaN if and only if an element is."""
    # On a CPU fp32 within a span, where torch sums pairwise, and float64 across: faster than float64 throughout.
    total = math.fsum(torch.abs(x[s], out=scratch(x, s.stop - s.start)).sum().item() for s in spans(x)) if on_cpu(x) else math.inf
    if not math.isfinite(total):  # not a CPU, or huge finite values overflowed fp32
        total = sum(x[s].abs().sum(dtype=torch.float64).item() for s in spans(x))
    return total


def all_finite(x: Tensor) -> bool:
    """Whether every element is finite. One fast pass: the norm is finite then, unless huge, which is looked at again."""
    return bool(torch.linalg.vector_norm(x).isfinite()) or bool(x.isfinite().all())
