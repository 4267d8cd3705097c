"""A plan under change: what the step would take with one unit's choice replaced, or two units merged."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

from ..core.chunks import chunk_lengths
from ..core.profile import ModelTrace
from .menu import Choice, Chosen, Menu
from .player import Change, player
from .timeline import Unit

ROUNDING = 1e-9
"""Share of the step time below which two predictions are the same."""


class Trials:
    """Units in plan order and their step time F(S), for the search.

    Places are those of the units given at first. A unit that was merged into the next is gone, its place stays empty. With
    `movable` there is a place for each tensor and a unit has that of its last one, so that units may be cut in other ways, but
    for those that travel in chunks.
    """

    def __init__(self, units: Sequence[Unit], trace: ModelTrace, menu: Menu, movable: bool = False) -> None:
        self._trace, self._menu = trace, menu
        self._fixed_s = trace.forward_s + trace.after_s
        placed: dict[int, Unit] = {unit.stop - 1 if movable else index: unit for index, unit in enumerate(units)}
        self._units: list[Unit | None] = [None] * (len(trace.tensors) if movable else len(units))
        self._pieces: list[list[tuple[int, int]]] = []
        ready: list[float] = []
        for place in range(len(self._units)):
            unit = placed.get(place)
            lengths = [0] if unit is None else chunk_lengths(unit.numel, unit.chunk_numel, menu.costs.world)
            self._pieces.append(list(enumerate(lengths, len(ready))))
            ready += [trace.tensors[place].ready_s if unit is None else unit.ready_s] * len(lengths)
        self._last = [pieces[-1][0] for pieces in self._pieces]
        self._player = player(ready, trace.backward_s, menu)
        for place, unit in placed.items():
            self._set(place, unit)

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

        It does not hold where a busy link, or a routine, slows the backward: a hidden unit sent faster then leaves more to it.
        """
        if self._menu.costs.link_contention > 0.0 or self._menu.costs.handling_s > 0.0:
            return 0
        return bisect_left(self._last, self._player.hidden())

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
        self._set(place, replace(self.at(place), option=chosen.option, codec=chosen.codec))

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
        known = [change for place, choice in changes for change in self._changes(place, self.at(place).numel, choice)]
        return self._fixed_s + self._player.attempt(known, limit - self._fixed_s)

    def best(self, place: int, choices: Chosen, below: float) -> tuple[float, int]:
        """The choice with the least F(S) if that is at most `below`, else (below, -1). Ties go to the first of `choices`."""
        if len(self._pieces[place]) == 1:
            end, choice = self._player.best(self._pieces[place][0][0], self.at(place).numel, choices, below - self._fixed_s)
            return self._fixed_s + end, choice
        least, found = below, -1
        for choice in choices.tolist():
            time = self.time_with(place, choice, least)
            if time < least or (time == least and found < 0):
                least, found = time, choice
        return least, found

    def best_pair(self, left: int, right: int, choices: tuple[Chosen, Chosen], below: float) -> tuple[int, int] | None:
        """The choices of two units, the earlier one first, with the least F(S) below `below`, if there are any.

        Units that travel in chunks are left as they are.
        """
        if len(self._pieces[left]) + len(self._pieces[right]) > 2:
            return None
        slots = self._pieces[left][0][0], self._pieces[right][0][0]
        numels = self.at(left).numel, self.at(right).numel
        _, pair = self._player.best_pair(slots, numels, choices, below - self._fixed_s)
        return pair

    def gain_at_most(self, place: int, limit: float = float("inf")) -> float:
        """Seconds that the step would be shorter if the unit were not there: more than any choice can be expected to gain."""
        return self.time - self._fixed_s - self._player.attempt(self._changes(place, 0, -1), limit)

    def time_merged(self, left: int, right: int, choice: int, limit: float = float("inf")) -> float:
        """F(S) in seconds if two neighbours of one dtype travelled as one buffer with this choice; see `time_with`."""
        numel = self.at(left).numel + self.at(right).numel
        changes = [*self._changes(left, 0, -1), *self._changes(right, numel, choice)]
        return self._fixed_s + self._player.attempt(changes, limit - self._fixed_s)

    def merge(self, left: int, right: int, choice: int) -> None:
        """Fuse two neighbours for good, at the place of the later one, which is ready last."""
        a, b = self.at(left), self.at(right)
        assert a.chunk_numel is b.chunk_numel is None, "chunks are for units that stay as they are"
        self._set(left, None)
        self._units[right] = replace(b, start=a.start, numel=a.numel + b.numel)
        self.replace(right, choice)

    def time_cut(self, places: Sequence[int], units: Sequence[Unit], limit: float = float("inf")) -> float:
        """F(S) in seconds if the units at these places were cut in another way; needs `movable`. See `time_with`."""
        wanted = {unit.stop - 1: (unit.numel, self._choice(unit)) for unit in units}
        parts = {**dict.fromkeys(places, (0, -1)), **wanted}
        changes = [change for place, (numel, choice) in parts.items() for change in self._changes(place, numel, choice)]
        return self._fixed_s + self._player.attempt(changes, limit - self._fixed_s)

    def cut(self, places: Sequence[int], units: Sequence[Unit]) -> None:
        """Cut the units at these places in another way for good; needs `movable`."""
        for place in places:
            self._set(place, None)
        for unit in units:
            self._set(unit.stop - 1, unit)

    def _set(self, place: int, unit: Unit | None) -> None:
        self._units[place] = unit
        numel, choice = (0, -1) if unit is None else (unit.numel, self._choice(unit))
        for change in self._changes(place, numel, choice):
            self._player.set(*change)

    def _changes(self, place: int, numel: int, choice: int) -> list[Change]:
        """What the player has to change if the place gets a unit of so many elements with this choice."""
        pieces = self._pieces[place]
        if len(pieces) == 1:
            return [(pieces[0][0], numel, choice)]
        if choice >= 0 and self._menu.choices[choice].option.compresses:
            return [(slot, length, choice) for slot, length in pieces]
        return [(pieces[0][0], numel, choice), *((slot, 0, -1) for slot, _ in pieces[1:])]  # only compressed units are cut

    def _choice(self, unit: Unit) -> int:
        return self._menu.place[Choice(unit.option, unit.codec if unit.option.compresses else 0)]
