"""Thrift: time that nobody notices is given for fewer elements that anything is cut from. Not in the paper."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..core.profile import ModelTrace
from .menu import Menu
from .timeline import Unit
from .trials import Trials

CUTS = 12
"""In how many places a unit is cut at most, to leave one part uncompressed."""


def spare(units: Sequence[Unit], trace: ModelTrace, menu: Menu, limit_s: float) -> list[Unit]:
    """Send elements uncompressed again while F(S) stays at most `limit_s`: whole units first, then parts of units."""
    kept = _whole(units, trace, menu, limit_s)
    while (cut := _cut_one(kept, trace, menu, limit_s)) is not None:
        kept = _whole(cut, trace, menu, limit_s)  # a cut may have made the plan faster
    return kept


def _whole(units: Sequence[Unit], trace: ModelTrace, menu: Menu, limit_s: float) -> list[Unit]:
    """Whole units in the order of what compression saves for their size, least first, so that the time goes as far as it can."""
    trials = Trials(units, trace, menu)
    compressed = [place for place in trials.places if trials.at(place).option.compresses]
    price = {
        place: (trials.best(place, menu.uncompressed, float("inf"))[0] - trials.time) / trials.at(place).numel
        for place in compressed
    }
    for place in sorted(compressed, key=price.__getitem__):
        _, choice = trials.best(place, menu.uncompressed, below=limit_s)
        if choice >= 0:
            trials.replace(place, choice)
    return trials.units


def _cut_one(units: list[Unit], trace: ModelTrace, menu: Menu, limit_s: float) -> list[Unit] | None:
    """The largest unit that can be cut so, in two parts; None if there is none."""
    for index in sorted(range(len(units)), key=lambda index: -units[index].numel):
        parts = _largest_plain_part(units, index, trace, menu, limit_s)
        if parts is not None:
            return [*units[:index], *parts, *units[index + 1 :]]
    return None


def _largest_plain_part(
    units: Sequence[Unit], index: int, trace: ModelTrace, menu: Menu, limit_s: float
) -> tuple[Unit, Unit] | None:
    """The unit in two, of which one is uncompressed and as large as the limit allows; None if there is no such cut."""
    if not units[index].option.compresses:
        return None
    best, most = None, 0
    for left, right in _cuts(units[index], trace):
        for plain in (0, 1):
            pair = [left, right]
            if pair[plain].numel <= most:
                continue
            for choice in menu.uncompressed.tolist():
                pair[plain] = replace(pair[plain], option=menu.choices[choice].option, codec=0, chunk_numel=None)
                if Trials([*units[:index], *pair, *units[index + 1 :]], trace, menu).time <= limit_s:
                    best, most = (pair[0], pair[1]), pair[plain].numel
                    break
    return best


def _cuts(unit: Unit, trace: ModelTrace) -> Iterator[tuple[Unit, Unit]]:
    inner = range(unit.start + 1, unit.stop)
    for boundary in inner[:: max(1, -(-len(inner) // CUTS))]:
        parts = [Unit.of(trace, a, b, unit.option, unit.codec) for a, b in ((unit.start, boundary), (boundary, unit.stop))]
        yield replace(parts[0], chunk_numel=unit.chunk_numel), replace(parts[1], chunk_numel=unit.chunk_numel)
