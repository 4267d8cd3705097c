"""The other way of units that are planned to be compressed: one flat allreduce, for some steps or for good.

A unit's float32 buffer serves both ways. The wire has the dtype of all that is sent uncompressed; where that is float32 too, this
way takes no memory of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..core.option import Option
from . import routines
from .lanes import Steps

PLAIN = Option.parse("AR.flat")
PLAIN_LANES = 1


class Releasing(Protocol):
    """A unit's compressed way: `carrier.Carrier`, or `low_rank.LowRank`."""

    def release(self, x: Tensor, rank: int) -> None:
        """Add to `x` what this rank has not sent so far."""

    def forget(self) -> None:
        """Give back the memory of feedback."""


class Plain:
    """Units that may be sent uncompressed. All methods but `run` are called between steps, alike on all ranks.

    Args:
        numels: of the units, by their index.
        group: of all ranks, on lane 0; `groups.make` makes it where `PLAIN` is among the options.
        rank: this one.
        wire_dtype: of what is sent.
        device: of the units' buffers.
    """

    def __init__(
        self, numels: Mapping[int, int], group: ProcessGroup, rank: int, wire_dtype: torch.dtype, device: torch.device
    ) -> None:
        self.sent: frozenset[int] = frozenset()
        """The units that are sent uncompressed at present."""
        self._group, self._rank = group, rank
        self._wire = {
            index: None if wire_dtype is torch.float32 else torch.empty(numel, dtype=wire_dtype, device=device)
            for index, numel in numels.items()
        }
        self._leaving: dict[int, Releasing] = {}
        self._released: set[int] = set()

    @property
    def units(self) -> frozenset[int]:
        """Those that may be."""
        return frozenset(self._wire)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers for the wire."""
        return sum(wire.nbytes for wire in self._wire.values() if wire is not None)

    def settle_on(self, leaving: Mapping[int, Releasing]) -> None:
        """Send these units uncompressed for good and no others. With their next step, or with the next one that is not skipped,
        goes what feedback remembers of them.
        """
        self.sent, self._leaving = frozenset(leaving), dict(leaving)
        self._wire = {index: self._wire[index] for index in leaving}

    def committed(self) -> list[int]:
        """The optimizer has taken the step. Returns the units of whose compressed way nothing is needed any more."""
        gone, self._released = sorted(self._released), set()
        for index in gone:
            self._leaving.pop(index).forget()
        return gone

    def run(self, index: int, x: Tensor, done: Callable[[int, int, int], object]) -> Steps:
        """Sum the unit over all ranks, in place; yields once.

        Args:
            index: of the unit.
            x: float32, shape (numel,), contiguous.
            done: called with the lane, the number of the action, and when it began, by `time.perf_counter_ns`.
        """
        if index in self._leaving:
            self._leaving[index].release(x, self._rank)
            self._released.add(index)
        start_ns = time.perf_counter_ns()
        wire = self._wire[index]
        with torch.profiler.record_function(f"espresso/{PLAIN}/{index}"):
            if wire is not None:
                wire.copy_(x)
            pending = routines.allreduce(x if wire is None else wire, self._group)
        yield pending
        if wire is not None:
            x.copy_(wire)
        done(PLAIN_LANES, 0, start_ns)
