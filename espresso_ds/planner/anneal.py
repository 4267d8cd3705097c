"""Simulated annealing of a plan, where a good plan may be far from what greedy steps reach: random cuts, best choices.

A round cuts one unit or two neighbours in another way, at random, and gives the parts and two other units the best choices. What
is slower by more than the temperature is taken back. The temperature falls to zero. Deterministic for a seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from ..core.profile import ModelTrace
from .limits import Limits
from .menu import Menu
from .timeline import Unit
from .trials import ROUNDING, Trials

HOT = 1e-2
"""Share of the step by which a round may make it slower at first."""
OTHERS = 2
"""Units besides the parts that are given the best choices in a round."""


def anneal(units: Sequence[Unit], trace: ModelTrace, menu: Menu, limits: Limits, rounds: int, seed: int = 0) -> list[Unit]:
    """The best plan seen; F(S) does not rise. Units that travel in chunks are not cut otherwise."""
    rng = random.Random(seed)
    trials = Trials(units, trace, menu, movable=True)
    best, least = trials.units, trials.time
    for number in range(rounds):
        heat = HOT * (1 - number / rounds) ** 2 * rng.random()
        limit = trials.time * (1 + heat)
        before = {place: trials.at(place) for place in trials.places}
        touched = _cut_otherwise(trials, trace, limits, rng)
        places = trials.places
        for place in {*touched, *rng.sample(places, min(OTHERS, len(places)))}:
            choices = limits.allowed(trials, place, menu.front(trials.at(place).numel))
            _, choice = trials.best(place, choices, below=trials.time * (1 - ROUNDING))
            if choice >= 0:
                trials.replace(place, choice)
        if trials.time > limit:
            _restore(trials, before)
        elif trials.time < least * (1 - ROUNDING):
            best, least = trials.units, trials.time
    return best


def _cut_otherwise(trials: Trials, trace: ModelTrace, limits: Limits, rng: random.Random) -> list[int]:
    """Move a boundary, split a unit, merge two, or change nothing; returns the places of the parts."""
    places = trials.places
    index = rng.randrange(len(places))
    left = trials.at(places[index])
    group, parts = [places[index]], [left]
    if any(trials.at(place).chunk_numel for place in places[index : index + 2]):
        return group
    if rng.random() < 1 / 3 and left.stop - left.start > 1:
        cut = rng.randrange(left.start + 1, left.stop)
        parts = [_of(trace, left.start, cut, left), _of(trace, cut, left.stop, left)]
    elif index + 1 < len(places):
        right = trials.at(places[index + 1])
        if right.dtype != left.dtype:
            return []
        group.append(places[index + 1])
        like = rng.choice((left, right))
        if rng.random() < 1 / 2:
            parts = [_of(trace, left.start, right.stop, like)]
        else:
            cut = left.stop + rng.choice((-1, 1)) * rng.randint(1, 16)
            cut = min(max(cut, left.start + 1), right.stop - 1)
            parts = [_of(trace, left.start, cut, left), _of(trace, cut, right.stop, right)]
    if not limits.allow_cut(trials, group, parts):
        return []
    trials.cut(group, parts)
    return [unit.stop - 1 for unit in parts]


def _restore(trials: Trials, before: dict[int, Unit]) -> None:
    changed = [place for place in trials.places if before.get(place) != trials.at(place)]
    trials.cut(changed, [unit for place, unit in before.items() if place in changed or place not in trials.places])


def _of(trace: ModelTrace, start: int, stop: int, like: Unit) -> Unit:
    return Unit.of(trace, start, stop, like.option, like.codec)
