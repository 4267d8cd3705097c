"""A plan that is played over and over with small changes: natively, or by the reference where native code is missing."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_double, c_int32, c_int64
from itertools import product
from typing import Protocol
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from .cost import Resource
from .menu import Chosen, Menu
from .native import library
from .play import LeanWalk, play

Change = tuple[int, int, int]
"""A unit, its number of elements, and its choice; choice -1: the unit does nothing."""

_INF = float("inf")


class Player(Protocol):
    """Units with choices; all ends in seconds from the start of backward."""

    def set(self, unit: int, numel: int, choice: int) -> None:
        """Give a unit a choice for good."""

    def end(self) -> float:
        """When backward and synchronisation are over."""

    def hidden(self) -> int:
        """Units before this one are done before a bubble (E 4.4, Property 1)."""

    def attempt(self, changes: Sequence[Change], limit: float = _INF) -> float:
        """The end with some units changed; any value above `limit` where it is above."""

    def best(self, unit: int, numel: int, choices: Chosen, below: float) -> tuple[float, int]:
        """The least end by any of the choices and that choice; (below, -1) if none is at most `below`. Ties: the first."""

    def best_pair(self, units: Pair, numels: Pair, choices: tuple[Chosen, Chosen], below: float) -> tuple[float, Pair | None]:
        """The least end below `below` by any choices of two units, the earlier one first, and these; (below, None) if none."""


Pair = tuple[int, int]


def player(ready_s: Sequence[float], backward_s: float, menu: Menu) -> Player:
    """A plan of units that are ready at these seconds of backward, which do nothing as yet."""
    return PythonPlayer(ready_s, backward_s, menu) if library() is None else NativePlayer(ready_s, backward_s, menu)


class NativePlayer:
    """By csrc/timeline.cpp."""

    def __init__(self, ready_s: Sequence[float], backward_s: float, menu: Menu) -> None:
        native = library()
        assert native is not None
        self._native, self._menu, self._keep = native, menu.native, menu
        ready = (c_double * len(ready_s))(*ready_s)
        self._plan = native.espresso_plan_new(len(ready_s), ready, backward_s, *menu.costs.delays)
        finalize(self, native.espresso_plan_free, self._plan)

    def set(self, unit: int, numel: int, choice: int) -> None:
        """See Player."""
        self._native.espresso_plan_set(self._plan, self._menu, unit, numel, choice)

    def end(self) -> float:
        """See Player."""
        return self._native.espresso_plan_end(self._plan)

    def hidden(self) -> int:
        """See Player."""
        return self._native.espresso_plan_hidden(self._plan)

    def attempt(self, changes: Sequence[Change], limit: float = _INF) -> float:
        """See Player."""
        number = len(changes)
        units, numels, choices = zip(*changes, strict=True)
        columns = (c_int32 * number)(*units), (c_int64 * number)(*numels), (c_int32 * number)(*choices)
        return self._native.espresso_plan_attempt(self._plan, self._menu, number, *columns, limit)

    def best(self, unit: int, numel: int, choices: Chosen, below: float) -> tuple[float, int]:
        """See Player."""
        end = c_double()
        found = self._native.espresso_plan_best(
            self._plan, self._menu, unit, numel, len(choices), choices.ctypes.data, below, byref(end)
        )
        return end.value, found

    def best_pair(self, units: Pair, numels: Pair, choices: tuple[Chosen, Chosen], below: float) -> tuple[float, Pair | None]:
        """See Player."""
        end, best = c_double(), (c_int32 * 2)()
        both = np.concatenate(choices)
        numbers = (c_int32 * 2)(*map(len, choices))
        found = self._native.espresso_plan_best_pair(
            self._plan,
            self._menu,
            (c_int32 * 2)(*units),
            (c_int64 * 2)(*numels),
            numbers,
            both.ctypes.data,
            below,
            best,
            byref(end),
        )
        return end.value, (best[0], best[1]) if found else None


class PythonPlayer:
    """By `play.play`. What `best` does to leave out choices is what csrc/timeline.cpp does."""

    def __init__(self, ready_s: Sequence[float], backward_s: float, menu: Menu) -> None:
        self._ready, self._backward_s, self._menu = list(ready_s), backward_s, menu
        self._walks: list[LeanWalk] = [()] * len(self._ready)

    def set(self, unit: int, numel: int, choice: int) -> None:
        """See Player."""
        self._walks[unit] = self._walk(numel, choice)

    def end(self) -> float:
        """See Player."""
        return max(self._play())

    def hidden(self) -> int:
        """See Player."""
        log: list[tuple[int, int, int, float, float]] = []
        self._play(log)
        spans = sorted((start, unit, end) for unit, _, _, start, end in log)
        until, before = 0.0, 0
        for start, unit, end in spans:
            if 0.0 < until < start:
                before = unit
            until = max(until, end)
        return before

    def attempt(self, changes: Sequence[Change], limit: float = _INF) -> float:
        """See Player."""
        kept = list(self._walks)
        for unit, numel, choice in changes:
            self._walks[unit] = self._walk(numel, choice)
        end = self.end()
        self._walks = kept
        return end

    def best(self, unit: int, numel: int, choices: Chosen, below: float) -> tuple[float, int]:
        """See Player."""
        least, winner = below, -1
        floors = self._floors(unit, numel, choices)
        for place in np.argsort(floors, kind="stable").tolist():
            if floors[place] > least:
                break
            end = self.attempt([(unit, numel, int(choices[place]))])
            if end < least or (end == least and (winner < 0 or place < winner)):
                least, winner = end, place
        return least, -1 if winner < 0 else int(choices[winner])

    def _floors(self, unit: int, numel: int, choices: Chosen) -> NDArray[np.float64]:
        """Lower bounds of the ends: each resource works off what comes behind some unit once that is ready."""
        loads = np.zeros((len(self._ready), len(Resource)))
        for other, walk in enumerate(self._walks):
            for resource, seconds in walk if other != unit else ():
                loads[other, resource] += seconds
        behind = np.cumsum(loads[::-1], axis=0)[::-1] + np.array(self._ready)[:, None]
        own = self._menu.weigh(numel, choices)[:, : len(Resource)]
        upto = behind[: unit + 1].max(axis=0) + own
        upto[:, Resource.COMPUTE] = self._backward_s + loads[:, Resource.COMPUTE].sum() + own[:, Resource.COMPUTE]
        return np.maximum(
            np.maximum(upto.max(axis=1), self._ready[unit] + own.sum(axis=1)), behind[unit + 1 :, 1:].max(initial=0.0)
        )

    def best_pair(self, units: Pair, numels: Pair, choices: tuple[Chosen, Chosen], below: float) -> tuple[float, Pair | None]:
        """See Player."""
        least, found = below, None
        for pair in product(choices[0].tolist(), choices[1].tolist()):
            end = self.attempt(list(zip(units, numels, pair, strict=True)))
            if end < least:
                least, found = end, pair
        return least, found

    def _walk(self, numel: int, choice: int) -> LeanWalk:
        return () if choice < 0 else self._menu.walk(choice, numel).lean

    def _play(self, log: list[tuple[int, int, int, float, float]] | None = None) -> tuple[float, float]:
        return play(self._walks, self._ready, self._backward_s, *self._menu.costs.delays, log)
