"""A plan under change: what the step would take with one unit's choice replaced, or two units merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..core.profile import ModelTrace
from .menu import Choice, Chosen, Menu
from .player import player
from .timeline import Unit

ROUNDING = 1e-9
"""Share of the step time below which two predictions are the same."""


class Trials:
    """Units in plan order and their step time F(S), for the search.

    Places are those of the units given at first. A unit that was merged into the next is gone, its place stays empty. With
    `movable` there is a place for each tensor and a unit has that of its last one, so that units may be cut in other ways.
    """

    def __init__(self, units: Sequence[Unit], trace: ModelTrace, menu: Menu, movable: bool = False) -> None:
        self._trace, self._menu = trace, menu
        self._units: list[Unit | None] = [None] * len(trace.tensors) if movable else list(units)
        ready = [tensor.ready_s for tensor in trace.tensors] if movable else [unit.ready_s for unit in units]
        self._player = player(ready, trace.backward_s, menu)
        self._fixed_s = trace.forward_s + trace.after_s
        for index, unit in enumerate(units):
            place = unit.stop - 1 if movable else index
            self._units[place] = unit
            self._player.set(place, unit.numel, self._choice(unit))

    def copy(self) -> Trials:
        """The same plan, to be changed on its own. Places are kept only if no unit was merged."""
        return Trials(self.units, self._trace, self._menu)

    @property
    def units(self) -> list[Unit]:
        """The units that are there, in plan order."""
        return [unit for unit in self._units if unit is not None]

    @property
    def places(self) -> list[int]:
        """Where they are."""
        return [place for place, unit in enumerate(self._units) if unit is not None]

    @property
    def time(self) -> float:
        """F(S) in seconds."""
        return self._fixed_s + self._player.end()

    @property
    def hidden(self) -> int:
        """Property 1 rules out the units at places before this one: they are done before a bubble (E 4.4).

        It does not hold where a busy link slows the backward: to send a hidden unit faster then leaves more to the backward.
        """
        return self._player.hidden() if self._menu.costs.link_contention == 0.0 else 0

    def at(self, place: int) -> Unit:
        """The unit at a place."""
        unit = self._units[place]
        assert unit is not None
        return unit

    def choice(self, place: int) -> int:
        """What the unit at a place was given, as an index into the menu."""
        return self._choice(self.at(place))

    def replace(self, place: int, choice: int) -> None:
        """Give the unit another choice for good."""
        chosen = self._menu.choices[choice]
        self._units[place] = replace(self.at(place), option=chosen.option, codec=chosen.codec)
        self._player.set(place, self.at(place).numel, choice)

    def replace_all(self, changes: Sequence[tuple[int, int]]) -> None:
        """Give several (place, choice) for good."""
        for place, choice in changes:
            self.replace(place, choice)

    def time_with(self, place: int, choice: int, limit: float = float("inf")) -> float:
        """F(S) in seconds with the unit's choice replaced; any value above `limit` where it is above."""
        return self.time_with_all([(place, choice)], limit)

    def time_with_all(self, changes: Sequence[tuple[int, int]], limit: float = float("inf")) -> float:
        """The same with several units' choices replaced."""
        if not changes:
            return self.time
        known = [(place, self.at(place).numel, choice) for place, choice in changes]
        return self._fixed_s + self._player.attempt(known, limit - self._fixed_s)

    def best(self, place: int, choices: Chosen, below: float) -> tuple[float, int]:
        """The choice with the least F(S) if that is at most `below`, else (below, -1). Ties go to the first of `choices`."""
        end, choice = self._player.best(place, self.at(place).numel, choices, below - self._fixed_s)
        return self._fixed_s + end, choice

    def best_pair(self, left: int, right: int, choices: tuple[Chosen, Chosen], below: float) -> tuple[int, int] | None:
        """The choices of two units, the earlier one first, with the least F(S) below `below`, if there are any."""
        numels = self.at(left).numel, self.at(right).numel
        _, pair = self._player.best_pair((left, right), numels, choices, below - self._fixed_s)
        return pair

    def gain_at_most(self, place: int, limit: float = float("inf")) -> float:
        """Seconds that the step would be shorter if the unit were not there: more than any choice can be expected to gain."""
        return self.time - self._fixed_s - self._player.attempt([(place, 0, -1)], limit)

    def time_merged(self, left: int, right: int, choice: int, limit: float = float("inf")) -> float:
        """F(S) in seconds if two neighbours of one dtype travelled as one buffer with this choice; see `time_with`."""
        changes = [(left, 0, -1), (right, self.at(left).numel + self.at(right).numel, choice)]
        return self._fixed_s + self._player.attempt(changes, limit - self._fixed_s)

    def merge(self, left: int, right: int, choice: int) -> None:
        """Fuse two neighbours for good, at the place of the later one, which is ready last."""
        a, b = self.at(left), self.at(right)
        self._units[left] = None
        self._units[right] = replace(b, start=a.start, numel=a.numel + b.numel)
        self._player.set(left, 0, -1)
        self.replace(right, choice)

    def time_cut(self, places: Sequence[int], units: Sequence[Unit], limit: float = float("inf")) -> float:
        """F(S) in seconds if the units at these places were cut in another way; needs `movable`. See `time_with`."""
        gone = [(place, 0, -1) for place in places if place not in {unit.stop - 1 for unit in units}]
        changes = [*gone, *((unit.stop - 1, unit.numel, self._choice(unit)) for unit in units)]
        return self._fixed_s + self._player.attempt(changes, limit - self._fixed_s)

    def cut(self, places: Sequence[int], units: Sequence[Unit]) -> None:
        """Cut the units at these places in another way for good; needs `movable`."""
        for place in places:
            self._units[place] = None
            self._player.set(place, 0, -1)
        for unit in units:
            self._units[unit.stop - 1] = unit
            self._player.set(unit.stop - 1, unit.numel, self._choice(unit))

    def _choice(self, unit: Unit) -> int:
        return self._menu.place[Choice(unit.option, unit.codec if unit.option.compresses else 0)]
