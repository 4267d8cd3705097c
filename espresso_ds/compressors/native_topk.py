"""csrc/topk.cpp: TopK exact and by sampled threshold, DGC, and their decoding. Contracts and references: `topk.py`.

Arguments are not checked, and all that a size decides is computed once: small tensors are encoded in the time of a few Python
calls.
"""

from __future__ import annotations

from ctypes import POINTER, Structure, c_char_p, c_int, c_int32, c_int64, c_void_p
from functools import lru_cache
from struct import Struct

import torch
from torch import Tensor

from ..core.errors import MismatchError
from ..core.native import declare
from .threshold import sampling

_NO_MEMORY, _NOT_A_PAYLOAD = 1, 2
_BFLOAT16 = torch.bfloat16


class _How(Structure):
    _fields_ = (
        ("numel", c_int64),
        ("k", c_int64),
        ("sample", c_int64),
        ("rank", c_int64),
        ("exact", c_int32),
        ("kinds", c_int32),
    )


_library = declare(
    {
        "espresso_topk_encode": (c_int, [c_char_p, POINTER(_How)]),
        "espresso_topk_decode_sum": (c_int, [c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64, c_int]),
    }
)
if _library is not None:
    _encode, _decode_sum = _library.espresso_topk_encode, _library.espresso_topk_decode_sum
_arrays = Struct("@6N2f").pack
"""x, residual, velocity, kept, velocity_kept, payload, momentum, scale: one argument takes ctypes half as long as eight."""


def topk_encode(x: Tensor, residual: Tensor | None, kept: Tensor | None, payload: Tensor, k: int, exact: bool) -> None:
    """As `topk.topk_encode`; `residual` and `kept` are of one dtype."""
    how = _how(x.numel(), k, exact, _narrow(residual, kept), False)
    arrays = _arrays(x.data_ptr(), _pointer(residual), 0, _pointer(kept), 0, payload.data_ptr(), 0.0, 0.0)
    if _encode(arrays, how):
        _no_memory(how)


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
    """As `topk.dgc_encode`; `residual` and `kept` are of one dtype, and so are `velocity` and `velocity_kept`."""
    how = _how(x.numel(), k, False, _narrow(residual, kept), velocity.dtype is _BFLOAT16)
    arrays = _arrays(
        x.data_ptr(),
        _pointer(residual),
        velocity.data_ptr(),
        _pointer(kept),
        _pointer(velocity_kept),
        payload.data_ptr(),
        momentum,
        scale,
    )
    if _encode(arrays, how):
        _no_memory(how)


def topk_decode_sum(rows: Tensor, out: Tensor, k: int, add: bool) -> None:
    """As `topk.topk_decode_sum`.

    Raises:
        MismatchError: a row is no payload for this size and k.
    """
    if _decode_sum(rows.data_ptr(), len(rows), rows.stride(0), out.data_ptr(), out.numel(), k, add) == _NOT_A_PAYLOAD:
        raise MismatchError(
            f"topk: received {len(rows)} payloads for {out.numel()} elements and k = {k}, one of which counts or places elements "
            "beyond that: ranks differ in tensor sizes or density; start all ranks with the same plan"
        )


@lru_cache(maxsize=4096)
def _how(numel: int, k: int, exact: bool, narrow: bool, narrow_velocity: bool) -> _How:
    return _How(numel, k, *sampling(numel, k, exact), exact, narrow + 2 * narrow_velocity)


def _pointer(array: Tensor | None) -> int:
    return 0 if array is None else array.data_ptr()


def _narrow(residual: Tensor | None, kept: Tensor | None) -> bool:
    memory = kept if residual is None else residual
    return memory is not None and memory.dtype is _BFLOAT16


def _no_memory(how: _How) -> None:
    raise MemoryError(f"topk: no memory to list the {how.k} largest of {how.numel} elements; use a lower density")
