"""Which kernels work on a tensor: native ones on a CPU, Triton ones on CUDA, none where they are missing: then the codec's own
torch code runs, which is their reference and writes the same bytes.

A backend is a module with the functions that codecs call, by the same names: `native` and `triton_kernels`. A codec asks for
`kernel(name, x)` and runs its own code on None: the device has no backend, or that lacks the function.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor


def kernel(name: str, x: Tensor) -> Callable[..., Any] | None:
    """The function `name` for tensors on the device of `x`, or None if the codec's torch code is to run."""
    return _kernel(name, "cpu" if x.is_cpu else x.device.type)  # x.device takes a quarter of a microsecond


@cache
def _kernel(name: str, device: str) -> Callable[..., Any] | None:
    if device == "cpu":
        from ..core.native import library
        from . import native

        return getattr(native, name, None) if library() is not None else None
    if device == "cuda":
        if importlib.util.find_spec("triton") is None:
            _warn_no_triton()
            return None
        from . import triton_kernels

        return getattr(triton_kernels, name, None)
    return None


@cache
def _warn_no_triton() -> None:
    warnings.warn(
        "triton is not installed, so codecs on the GPU run in plain torch, several times as long; `pip install triton`",
        RuntimeWarning,
        stacklevel=4,
    )
