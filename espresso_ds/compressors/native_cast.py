"""The kernels of csrc/ for codecs that encode element by element: casts. Contracts and references: `cast.py`.

Arguments are not checked: small tensors are encoded in the time of a few Python calls.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_void_p

import torch
from torch import Tensor

from ..core.native import declare

_FUNCTIONS = ("fp16", "bf16")
_library = declare(
    {f"espresso_{name}_{verb}": (None, [c_void_p] * 6) for name in _FUNCTIONS for verb in ("encode", "decode_sum")}
)
_kernels: dict[tuple[str, str], Callable[..., None]] = {}
if _library is not None:
    _encoders = {name: getattr(_library, f"espresso_{name}_encode") for name in _FUNCTIONS}
    _decoders = {name: getattr(_library, f"espresso_{name}_decode_sum") for name in _FUNCTIONS}


def cast_encode(x: Tensor, residual: Tensor | None, kept: Tensor | None, payload: Tensor, format: str) -> None:
    _encode(_encoders[format], x, residual, kept, payload)


def cast_decode_sum(rows: Tensor, out: Tensor, format: str, add: bool) -> None:
    _decoders[format](rows.data_ptr(), len(rows), rows.stride(0), out.data_ptr(), out.numel(), add)


def _encode(function, x, residual, kept, payload, *parameters) -> None:
    memory = residual if kept is None else kept
    function(
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        None if kept is None else kept.data_ptr(),
        payload.data_ptr(),
        x.numel(),
        memory is not None and memory.dtype is torch.bfloat16,
        *parameters,
    )
