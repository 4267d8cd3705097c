"""The optimum of small instances, by exact.cpp, which is compiled when first needed."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from ctypes import byref, c_double, c_int32, c_int64
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from espresso_ds.core.profile import ModelTrace
from espresso_ds.planner.menu import STEPS, Choice, Menu
from espresso_ds.planner.timeline import Unit

SOURCE = Path(__file__).with_name("exact.cpp")
BUDGET = 5_000_000
"""Plans that are played at most, some 3 s."""


class Optimum(NamedTuple):
    """The fastest of all plans in which every tensor is a unit of its own."""

    units: tuple[Unit, ...] | None  # None: none is faster than what was given
    time_s: float  # F(S)
    played: int  # plans whose timeline was played
    bounded: int  # lower bounds that were taken
    proven: bool  # within BUDGET


@cache
def library() -> ctypes.CDLL:
    """The compiled search. Raises CalledProcessError where g++ is missing or fails."""
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, "exact.so")
        flags = ("-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared")
        subprocess.run(["g++", *flags, "-o", str(built), str(SOURCE)], check=True, timeout=120)
        native = ctypes.CDLL(str(built))
    native.espresso_exact.restype = c_double
    return native


def optimum(trace: ModelTrace, menu: Menu, below_s: float, budget: int = BUDGET) -> Optimum:
    """The fastest plan of those with an F(S) below `below_s`, over all choices of the menu for all tensors."""
    sizes = np.array([tensor.numel for tensor in trace.tensors])
    ready = np.array([tensor.ready_s for tensor in trace.tensors])
    seconds_of = np.array([menu.costs.seconds(op, sizes) for op in menu.operations])
    resource_of = np.array([menu.costs.resource(op) for op in menu.operations], dtype=np.int8)
    resources = np.ascontiguousarray(resource_of[menu.steps])
    seconds = np.ascontiguousarray(seconds_of[menu.steps].transpose(2, 0, 1))
    assert seconds.shape == (len(sizes), len(menu.choices), STEPS)
    best, work = (c_int32 * len(sizes))(*[-1] * len(sizes)), (c_int64 * 3)()
    fixed_s = trace.forward_s + trace.after_s
    end = library().espresso_exact(
        len(sizes),
        ready.ctypes.data_as(ctypes.c_void_p),
        c_double(trace.backward_s),
        c_double(menu.costs.contention),
        c_double(menu.costs.link_contention),
        len(menu.choices),
        menu.counts.ctypes.data_as(ctypes.c_void_p),
        resources.ctypes.data_as(ctypes.c_void_p),
        seconds.ctypes.data_as(ctypes.c_void_p),
        c_double(below_s - fixed_s),
        c_int64(budget),
        best,
        byref(work),
    )
    units = None
    if best[0] >= 0:
        units = tuple(Unit.of(trace, index, index + 1, *_choice(menu, place)) for index, place in enumerate(best))
    return Optimum(units, end + fixed_s, work[0], work[1], bool(work[2]))


def _choice(menu: Menu, place: int) -> Choice:
    return menu.choices[place]
