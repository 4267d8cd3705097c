"""How Python calls the encoders and decoders of csrc/ that take a tensor as it is: the arguments that they all begin with."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import byref, c_void_p

import torch
from torch import Tensor

from .parts import Parts

WORD = c_void_p
"""Any argument: ctypes converts an int to it in a fraction of what c_int64 takes, and None to 0."""


def encoder(function: Callable[..., None]) -> Callable[..., None]:
    """A function of (x, residual, kept, payload, *the codec's own) that calls the C function. All of them take x in parts too."""

    def encode(x: Tensor | Parts, residual: Tensor | None, kept: Tensor | None, payload: Tensor, *parameters: int) -> None:
        memory = residual if kept is None else kept
        function(
            *((None, byref(x.struct())) if isinstance(x, Parts) else (x.data_ptr(), None)),
            None if residual is None else residual.data_ptr(),
            None if kept is None else kept.data_ptr(),
            payload.data_ptr(),
            x.numel(),
            memory is not None and memory.dtype is torch.bfloat16,
            *parameters,
        )

    return encode


def decoder(function: Callable[..., None]) -> Callable[..., None]:
    """A function of (rows, out, *the codec's own) that calls the C function."""

    def decode_sum(rows: Tensor, out: Tensor, *parameters: int) -> None:
        function(rows.data_ptr(), len(rows), rows.stride(0), out.data_ptr(), out.numel(), *parameters)

    return decode_sum
