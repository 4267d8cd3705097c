"""The kernels of csrc/ for tensors on a CPU, by the names that `backend.kernel` asks for.

Arguments are those of `Codec.encode` and `Codec.decode_sum`, then the codec's own; they are not checked. Small tensors are
encoded in the time of a few Python calls, so nothing here slices, views or allocates.
"""

from __future__ import annotations

from ctypes import c_int, c_int64

from ..core import native
from .native_call import WORD, decoder, encoder
from .native_cast import (
    cast_decode_sum,
    cast_encode,
    fp8_decode_sum,
    fp8_encode,
    natural_decode_sum,
    natural_encode,
    signsgd_decode_sum,
    signsgd_encode,
)
from .native_topk import dgc_encode, topk_decode_sum, topk_encode

__all__ = [
    "cast_decode_sum",
    "cast_encode",
    "cpu_level",
    "dgc_encode",
    "fp8_decode_sum",
    "fp8_encode",
    "limit_cpu",
    "natural_decode_sum",
    "natural_encode",
    "onebit_decode_sum",
    "onebit_encode",
    "quantize_decode_sum",
    "quantize_encode",
    "sign_decode_sum",
    "sign_encode",
    "signsgd_decode_sum",
    "signsgd_encode",
    "topk_decode_sum",
    "topk_encode",
    "use_threads",
]


_library = native.declare(
    {
        "espresso_cpu_level": (c_int, []),
        "espresso_cpu_limit": (None, [c_int]),
        "espresso_threads": (None, [c_int, c_int64]),
        "espresso_sign_encode": (None, [WORD] * 7),
        "espresso_sign_decode_sum": (None, [WORD] * 6),
        "espresso_onebit_encode": (None, [WORD] * 7),
        "espresso_onebit_decode_sum": (None, [WORD] * 6),
        "espresso_quantize_encode": (None, [WORD] * 9),
        "espresso_quantize_decode_sum": (None, [WORD] * 8),
    }
)


def use_threads(count: int, least_numel: int = 1 << 19) -> None:
    """Let kernels work on `count` threads, the calling one among them; at first it is 1. Results do not depend on it.

    Args:
        count: of threads.
        least_numel: of a tensor that they are woken up for: with fewer elements the caller is done before they have begun.
    """
    if _library is not None:
        _library.espresso_threads(count, least_numel)


def cpu_level() -> str:
    """Which instructions the kernels use: "AVX-512", "AVX2", "baseline" for any CPU of its kind, or "none" without kernels."""
    return "none" if _library is None else ("baseline", "AVX2", "AVX-512")[_library.espresso_cpu_level()]


def limit_cpu(level: int) -> None:
    """Use no instructions above `level` (0 baseline, 1 AVX2, 2 all). Results do not depend on it."""
    if _library is not None:
        _library.espresso_cpu_limit(level)


if _library is not None:
    sign_encode = encoder(_library.espresso_sign_encode)
    sign_decode_sum = decoder(_library.espresso_sign_decode_sum)
    onebit_encode = encoder(_library.espresso_onebit_encode)
    onebit_decode_sum = decoder(_library.espresso_onebit_decode_sum)
    quantize_encode = encoder(_library.espresso_quantize_encode)
    quantize_decode_sum = decoder(_library.espresso_quantize_decode_sum)
