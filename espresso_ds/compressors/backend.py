"""Which kernels work on a tensor: native ones on a CPU, Triton ones on CUDA, none where they are missing: then the codec's own
torch code runs, which is their reference and writes the same bytes.

A backend is a module with the functions that codecs call, by the same names: `native` and `triton_kernels`. A codec asks for
`kernel(name, x)` and runs its own code on None: the device has no backend, or that lacks the function.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor


def kernel(name: str, x: Tensor) -> Callable[..., Any] | None:
    """The function `name` for tensors on the device of `x`, or None if the codec's torch code is to run."""
    return _kernel(name, "cpu" if x.is_cpu else x.device.type)  # x.device takes a quarter of a microsecond


def cpu_kernel(name: str) -> Callable[..., Any] | None:
    """The function `name` for what is on a CPU."""
    return _kernel(name, "cpu")


@contextmanager
def asked() -> Iterator[dict[str, bool]]:
    """Which kernels codecs ask for inside the `with` block, by name, and whether they get them; for reports, by one thread."""
    global _kernel
    found: dict[str, bool] = {}
    unwatched = _kernel

    def watched(name: str, device: str) -> Callable[..., Any] | None:
        work = unwatched(name, device)
        found[name] = work is not None
        return work

    _kernel = watched  # swapped, so that nobody pays for it otherwise
    try:
        yield found
    finally:
        _kernel = unwatched


@cache
def _find(name: str, device: str) -> Callable[..., Any] | None:
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


_kernel: Callable[[str, str], Callable[..., Any] | None] = _find


@cache
def _warn_no_triton() -> None:
    warnings.warn(
        "triton is not installed, so codecs on the GPU run in plain torch, several times as long; `pip install triton`",
        RuntimeWarning,
        stacklevel=4,
    )
