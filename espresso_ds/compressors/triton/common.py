"""What all kernels share: p = x + residual, what is kept of it, and small integers in bits.

bfloat16 goes through its bits (tensors viewed as int16), rounded to nearest even here: one arithmetic on every GPU, and in
Triton's interpreter, whose own conversion rounds ties otherwise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

EXACT = {"enable_fp_fusion": False}
"""Launch option of kernels whose bytes must equal the reference's: a * b + c is rounded twice, as torch rounds it."""


def bits(memory: Tensor | None) -> Tensor | None:
    """A residual as kernels take it: bfloat16 as int16, float32 and None as they are."""
    return memory.view(torch.int16) if memory is not None and memory.dtype == torch.bfloat16 else memory


@triton.jit
def floats(payload: tl.tensor) -> tl.tensor:
    """A pointer to bytes as one to float32."""
    return payload.to(tl.pointer_type(tl.float32))


@triton.jit
def is_finite(x: tl.tensor) -> tl.tensor:
    """Whether float32 `x` is neither NaN nor Inf, by its exponent: no compiler flag can fold this test away."""
    return (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000


@triton.jit
def from_bfloat16(raw: tl.tensor) -> tl.tensor:
    """Float32 of bfloat16 bits (int16)."""
    return (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def load_memory(memory: tl.tensor, at: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Elements `at` of a float32 residual, or of a bfloat16 one viewed as int16, as float32; 0.0 outside."""
    raw = tl.load(memory + at, mask=inside, other=0)
    if memory.dtype.element_ty == tl.int16:
        return from_bfloat16(raw)
    else:
        return raw


@triton.jit
def load_sum(x: tl.tensor, residual: tl.tensor, at: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Elements `at` of p = x + residual; `residual` may be None."""
    p = tl.load(x + at, mask=inside, other=0.0)
    if residual is not None:
        p += load_memory(residual, at, inside)
    return p


@triton.jit
def clamp_to_bfloat16(x: tl.tensor) -> tl.tensor:
    """`x` within the range of bfloat16, beyond which it would be rounded to infinity."""
    LARGEST: tl.constexpr = 2.0**128 - 2.0**120
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST)


@triton.jit
def to_bfloat16(x: tl.tensor) -> tl.tensor:
    """The bits (int16) of float32 `x` rounded to the nearest bfloat16, ties to even; NaN becomes anything."""
    raw = x.to(tl.int32, bitcast=True)
    return ((raw + 0x7FFF + ((raw >> 16) & 1)) >> 16).to(tl.int16)


@triton.jit
def store_kept(kept: tl.tensor, at: tl.tensor, error: tl.tensor, inside: tl.tensor) -> None:
    """Write `error` into the residual `kept` (float32, or bfloat16 viewed as int16); zero where it is not finite."""
    error = tl.where(is_finite(error), error, 0.0)
    if kept.dtype.element_ty == tl.int16:
        tl.store(kept + at, to_bfloat16(clamp_to_bfloat16(error)), mask=inside)
    else:
        tl.store(kept + at, error, mask=inside)


@triton.jit
def pack(levels: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """Pack `levels` (int32, shape (m,), below 2**WIDTH, WIDTH 1, 2, 4 or 8) into bytes (m * WIDTH / 8,), lowest bits first."""
    LANES: tl.constexpr = 8 // WIDTH
    lanes = tl.reshape(levels, [levels.shape[0] // LANES, LANES])
    return tl.sum(lanes << (tl.arange(0, LANES) * WIDTH)[None, :], axis=1).to(tl.uint8)


@triton.jit
def unpack(packed: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """Inverse of `pack`."""
    LANES: tl.constexpr = 8 // WIDTH
    lanes = packed.to(tl.int32)[:, None] >> (tl.arange(0, LANES) * WIDTH)[None, :]
    return tl.reshape(lanes & ((1 << WIDTH) - 1), [packed.shape[0] * LANES])
