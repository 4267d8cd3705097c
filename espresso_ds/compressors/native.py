"""The kernels of csrc/ for tensors on a CPU, by the names that `backend.kernel` asks for.

Arguments are those of `Codec.encode` and `Codec.decode_sum`, and are not checked.

Small tensors are encoded in the time of a few Python calls, so nothing here slices, views or allocates.
"""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from ..core import native
from .native_topk import dgc_encode, topk_decode_sum, topk_encode

__all__ = [
    "cpu_level",
    "dgc_encode",
    "limit_cpu",
    "onebit_decode_sum",
    "onebit_encode",
    "quantize_decode_sum",
    "quantize_encode",
    "sign_decode_sum",
    "sign_encode",
    "topk_decode_sum",
    "topk_encode",
    "use_threads",
]

_ENCODE = (None, [c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int])
_DECODE_SUM = (None, [c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int])

_library = native.declare(
    {
        "espresso_cpu_level": (c_int, []),
        "espresso_cpu_limit": (None, [c_int]),
        "espresso_threads": (None, [c_int]),
        "espresso_sign_encode": _ENCODE,
        "espresso_sign_decode_sum": _DECODE_SUM,
        "espresso_onebit_encode": _ENCODE,
        "espresso_onebit_decode_sum": _DECODE_SUM,
        "espresso_quantize_encode": (None, [*_ENCODE[1], c_int, c_int]),
        "espresso_quantize_decode_sum": (None, [*_DECODE_SUM[1], c_int, c_int]),
    }
)


def use_threads(count: int) -> None:
    """Let kernels work on `count` threads, the calling one among them; at first it is 1. Results do not depend on it."""
    if _library is not None:
        _library.espresso_threads(count)


def cpu_level() -> str:
    """Which instructions the kernels use: "AVX-512", "AVX2", "baseline" for any CPU of its kind, or "none" without kernels."""
    return "none" if _library is None else ("baseline", "AVX2", "AVX-512")[_library.espresso_cpu_level()]


def limit_cpu(level: int) -> None:
    """Use no instructions above `level` (0 baseline, 1 AVX2, 2 all). Results do not depend on it."""
    if _library is not None:
        _library.espresso_cpu_limit(level)


if _library is not None:
    _sign_encode, _sign_decode_sum = _library.espresso_sign_encode, _library.espresso_sign_decode_sum
    _onebit_encode, _onebit_decode_sum = _library.espresso_onebit_encode, _library.espresso_onebit_decode_sum
    _quantize_encode, _quantize_decode_sum = _library.espresso_quantize_encode, _library.espresso_quantize_decode_sum


def sign_encode(x: Tensor, residual: Tensor | None, kept: Tensor | None, payload: Tensor) -> None:
    """EF-SignSGD (compressors/sign.py)."""
    _sign_encode(x.data_ptr(), _at(residual), _at(kept), payload.data_ptr(), x.numel(), _narrow(residual, kept))


def sign_decode_sum(rows: Tensor, out: Tensor, add: bool) -> None:
    """The sum of the decoded `rows` into `out`, or added to it."""
    _sign_decode_sum(rows.data_ptr(), len(rows), rows.stride(0), out.data_ptr(), out.numel(), add)


def onebit_encode(x: Tensor, residual: Tensor | None, kept: Tensor | None, payload: Tensor) -> None:
    """1-bit with two means (compressors/onebit.py)."""
    _onebit_encode(x.data_ptr(), _at(residual), _at(kept), payload.data_ptr(), x.numel(), _narrow(residual, kept))


def onebit_decode_sum(rows: Tensor, out: Tensor, add: bool) -> None:
    """The sum of the decoded `rows` into `out`, or added to it."""
    _onebit_decode_sum(rows.data_ptr(), len(rows), rows.stride(0), out.data_ptr(), out.numel(), add)


def quantize_encode(x: Tensor, residual: Tensor | None, kept: Tensor | None, payload: Tensor, bits: int, symmetric: bool) -> None:
    """Uniform quantization (compressors/quantize.py) on the grid of absmax, if `symmetric`, else on that of minmax."""
    _quantize_encode(
        x.data_ptr(), _at(residual), _at(kept), payload.data_ptr(), x.numel(), _narrow(residual, kept), bits, symmetric
    )


def quantize_decode_sum(rows: Tensor, out: Tensor, bits: int, symmetric: bool, add: bool) -> None:
    """The sum of the decoded `rows` into `out`, or added to it."""
    _quantize_decode_sum(rows.data_ptr(), len(rows), rows.stride(0), out.data_ptr(), out.numel(), add, bits, symmetric)


def _at(memory: Tensor | None) -> int | None:
    return None if memory is None else memory.data_ptr()


def _narrow(residual: Tensor | None, kept: Tensor | None) -> bool:
    """Whether the residual is bfloat16."""
    memory = residual if kept is None else kept
    return memory is not None and memory.dtype is torch.bfloat16
