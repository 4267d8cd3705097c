"""The compiled part of the package (csrc/): one plain C library, loaded by ctypes, which lets go of the GIL in every call."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

Signatures = Mapping[str, tuple[Any, Sequence[Any]]]
"""C functions by name: result and arguments as ctypes types."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None where it was not built, with a warning: all works without it, many times slower."""
    found = sorted(Path(__file__).parents[1].glob("_native*.so"))
    if not found:
        warnings.warn(
            "espresso_ds was installed without its native code: planning runs in plain Python, hundreds of times as long, and "
            "codecs on the CPU in plain torch, some ten times as long; install a C++ compiler (apt install g++), then "
            "espresso_ds again",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return ctypes.CDLL(str(found[0]))


def declare(signatures: Signatures) -> ctypes.CDLL | None:
    """`library`, with the result and arguments of its functions `signatures` set."""
    native = library()
    if native is not None:
        for name, (result, arguments) in signatures.items():
            function = getattr(native, name)
            function.restype, function.argtypes = result, list(arguments)
    return native
