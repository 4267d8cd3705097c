"""Other cuts of a plan's units: boundaries moved by some tensors, and units split in two.

Uniform starts cut by size alone. Where a boundary lies decides when a unit is ready, and how much is left for the last one, that
nothing hides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from ..core.profile import ModelTrace
from .limits import Limits
from .menu import Menu
from .timeline import Unit
from .trials import ROUNDING, Trials

MOVES = (1, 2, 4, 8, 16)
"""By how many tensors a boundary is moved."""
SPLITS = 7
"""In how many places a unit is split at most."""
HOPEFUL = 1.05
"""A cut that costs more than this may not be made up for by other choices."""


def recut(trials: Trials, trace: ModelTrace, menu: Menu, limits: Limits) -> bool:
    """Move boundaries and split units, in place, as long as it gains; whether it did. The trials must be movable.

    Of all ways to cut a unit in two, or two neighbours elsewhere, the best is tried with the best choices for both parts.
    """
    gained = False
    for way, size in ((_moved, 2), (_split, 1)):
        for places in _groups(trials, size):
            if any(place not in trials.places for place in places):
                continue  # cut away meanwhile
            before = [trials.at(place) for place in places]
            if any(unit.chunk_numel for unit in before):
                continue
            cuts = [units for units in way(before, trace) if limits.allow_cut(trials, places, units)]
            if not cuts:
                continue
            limit = trials.time * (1 - ROUNDING)
            _, best = min((trials.time_cut(places, units, limit * HOPEFUL), number) for number, units in enumerate(cuts))
            trials.cut(places, cuts[best])
            parts = [unit.stop - 1 for unit in cuts[best]]
            for place in parts:
                choices = limits.allowed(trials, place, menu.front(trials.at(place).numel))
                _, choice = trials.best(place, choices, below=trials.time * (1 - ROUNDING))
                if choice >= 0:
                    trials.replace(place, choice)
            if trials.time < limit:
                gained = True
            else:
                trials.cut(parts, before)
    return gained


def _groups(trials: Trials, size: int) -> list[tuple[int, ...]]:
    return list(pairwise(trials.places)) if size == 2 else [(place,) for place in trials.places]


def _moved(units: Sequence[Unit], trace: ModelTrace) -> Iterator[list[Unit]]:
    left, right = units
    if left.dtype == right.dtype:
        for boundary in sorted({left.stop + sign * move for move in MOVES for sign in (-1, 1)}):
            if left.start < boundary < right.stop:
                yield [_of(trace, left.start, boundary, left), _of(trace, boundary, right.stop, right)]


def _split(units: Sequence[Unit], trace: ModelTrace) -> Iterator[list[Unit]]:
    (unit,) = units
    inner = range(unit.start + 1, unit.stop)
    for boundary in inner[:: max(1, -(-len(inner) // SPLITS))]:
        yield [_of(trace, unit.start, boundary, unit), _of(trace, boundary, unit.stop, unit)]


def _of(trace: ModelTrace, start: int, stop: int, like: Unit) -> Unit:
    return Unit.of(trace, start, stop, like.option, like.codec)
