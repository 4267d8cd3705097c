"""The native timeline (csrc/timeline.cpp), or word that it is missing."""

from __future__ import annotations

import ctypes
import warnings
from ctypes import POINTER, c_double, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

_SIGNATURES = {
    "espresso_menu_new": (
        c_void_p,
        (c_double, c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_void_p, c_int, c_void_p, c_void_p),
    ),
    "espresso_menu_free": (None, (c_void_p,)),
    "espresso_menu_seconds": (None, (c_void_p, c_int64, c_void_p)),
    "espresso_menu_weigh": (None, (c_void_p, c_int64, c_int, c_void_p, c_void_p)),
    "espresso_menu_front": (c_int, (c_void_p, c_int64, c_int, c_void_p, c_double, c_void_p)),
    "espresso_plan_new": (c_void_p, (c_int, c_void_p, c_double, c_double, c_double)),
    "espresso_plan_free": (None, (c_void_p,)),
    "espresso_plan_set": (None, (c_void_p, c_void_p, c_int, c_int64, c_int)),
    "espresso_plan_end": (c_double, (c_void_p,)),
    "espresso_plan_hidden": (c_int, (c_void_p,)),
    "espresso_plan_attempt": (
        c_double,
        (c_void_p, c_void_p, c_int, POINTER(c_int32), POINTER(c_int64), POINTER(c_int32), c_double),
    ),
    "espresso_plan_best": (c_int, (c_void_p, c_void_p, c_int, c_int64, c_int, c_void_p, c_double, POINTER(c_double))),
    "espresso_plan_best_pair": (
        c_int,
        (
            c_void_p,
            c_void_p,
            POINTER(c_int32),
            POINTER(c_int64),
            POINTER(c_int32),
            c_void_p,
            c_double,
            POINTER(c_int32),
            POINTER(c_double),
        ),
    ),
}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None where it was not built, with a warning: all works without it, hundreds of times slower."""
    found = sorted(Path(__file__).parents[1].glob("_native*.so"))
    if not found:
        warnings.warn(
            "espresso_ds was installed without its native code, so planning runs in plain Python and takes hundreds of times as "
            "long; install a C++ compiler (apt install g++) and espresso_ds again",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    native = ctypes.CDLL(str(found[0]))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(native, name)
        function.restype, function.argtypes = result, arguments
    return native
