"""The native timeline (csrc/timeline.cpp), or word that it is missing."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_double, c_int, c_int32, c_int64, c_void_p
from functools import cache

from ..core.native import declare

_SIGNATURES = {
    "espresso_menu_new": (
        c_void_p,
        (c_double, c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_void_p, c_int, c_void_p, c_void_p),
    ),
    "espresso_menu_free": (None, (c_void_p,)),
    "espresso_menu_seconds": (None, (c_void_p, c_int64, c_void_p)),
    "espresso_menu_weigh": (None, (c_void_p, c_int64, c_int, c_void_p, c_void_p)),
    "espresso_menu_front": (c_int, (c_void_p, c_int64, c_int, c_void_p, c_double, c_void_p)),
    "espresso_plan_new": (c_void_p, (c_int, c_void_p, c_double, c_double, c_double, c_double)),
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
    """The compiled library with the timeline's functions, or None where it was not built."""
    return declare(_SIGNATURES)
