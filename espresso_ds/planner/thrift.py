"""Thrift: time that nobody notices is given for gradients that lose less. Not in the paper.

What a plan loses is the sum over its elements of the relative error of their codecs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..core.profile import ModelTrace
from .limits import Limits
from .menu import Menu
from .timeline import Unit
from .trials import Trials

CUTS = 12
"""In how many places a unit is cut at most, to leave one part uncompressed."""


def spare(units: Sequence[Unit], trace: ModelTrace, menu: Menu, limits: Limits, limit_s: float) -> list[Unit]:
    """Lose less of the gradients while F(S) stays at most `limit_s`: whole units first, then parts of units."""
    kept = _whole(units, trace, menu, limits, limit_s)
    while (cut := _cut_one(kept, trace, menu, limit_s)) is not None:
        kept = _whole(cut, trace, menu, limits, limit_s)  # a cut may have made the plan faster
    return kept


class _Offer(NamedTuple):
    """A choice for one unit that loses less than its present one, and the seconds that this costs for each element's worth."""

    price: float
    place: int
    choice: int


def _whole(units: Sequence[Unit], trace: ModelTrace, menu: Menu, limits: Limits, limit_s: float) -> list[Unit]:
    """Whole units, cheapest first, so that the time goes as far as it can: uncompressed, or with a codec that loses less."""
    trials = Trials(units, trace, menu)
    while offers := sorted(_offers(trials, menu, limits, limit_s)):
        changed: set[int] = set()
        for _, place, choice in offers:
            if place in changed or not limits.allow(trials, place, choice):  # what was changed since may have used them up
                continue
            if trials.time_with(place, choice, limit_s) <= limit_s:
                trials.replace(place, choice)
                changed.add(place)
    return trials.units


def _offers(trials: Trials, menu: Menu, limits: Limits, limit_s: float) -> Iterator[_Offer]:
    """For each compressed unit the fastest choice of each smaller loss that keeps the limit."""
    losses = menu.losses
    for place in trials.places:
        unit, loss = trials.at(place), losses[trials.choice(place)]
        if not unit.option.compresses:
            continue
        choices = np.union1d(menu.uncompressed, limits.allowed(trials, place, menu.front(unit.numel))).astype(np.int32)
        for less in np.unique(losses[choices]):
            if less >= loss:
                break
            seconds, choice = trials.best(place, choices[losses[choices] == less], below=limit_s)
            if choice >= 0:
                yield _Offer((seconds - trials.time) / (unit.numel * (loss - less)), place, choice)


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
