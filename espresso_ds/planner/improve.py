"""Improvement after greedy: every choice looked at again, over the whole tree, until nothing gains.

Not in the paper. A choice made early can lose its worth through later ones, and Algorithm 2 offloads whole options only, while
here each C and D of an option goes where it suits.
"""

from __future__ import annotations

from itertools import combinations
from math import comb

from .limits import Limits
from .menu import Chosen, Menu
from .trials import ROUNDING, Trials

WORTHWHILE = 1e-4
"""Least share of the step that a further pass must have saved."""
EFFORT = 50_000
"""Combinations of two units' choices that are looked at."""


def descend(trials: Trials, menu: Menu, limits: Limits, held: int = -1) -> None:
    """Give one unit after another, largest first, the best choice of all, in place, until a pass gains next to nothing.

    The unit at the place `held` keeps its choice.
    """
    before = float("inf")
    while trials.time < before * (1 - WORTHWHILE):
        before = trials.time
        for place in by_size(trials):
            if place == held:
                continue
            if place < trials.hidden and not trials.at(place).option.compresses:
                continue  # Property 1; one that is compressed may spare the backward its codec's work
            if trials.gain_at_most(place) <= trials.time * ROUNDING:
                continue
            choices = limits.allowed(trials, place, menu.front(trials.at(place).numel))
            _, choice = trials.best(place, choices, below=trials.time * (1 - ROUNDING))
            if choice >= 0:
                trials.replace(place, choice)


def exchange(trials: Trials, menu: Menu, limits: Limits) -> bool:
    """Give pairs of units the best choices for both, neighbours first, in place; whether that gained anything.

    What one unit frees only the other may be able to use. Pairs are tried as long as EFFORT combinations allow: all of them in a
    plan of a few units, some neighbours in a large one.
    """
    gained, left = False, EFFORT
    count = len(trials.places)
    every = (len(menu.choices) * count) ** 2 // 2 <= EFFORT
    for distance in range(1, count):
        for first, second in zip(trials.places, trials.places[distance:], strict=False):
            wide = [menu.everything if every else menu.front(trials.at(place).numel) for place in (first, second)]
            left -= len(wide[0]) * len(wide[1])
            if left < 0:
                return gained
            gained |= _best_of_two(trials, limits, (first, second), (wide[0], wide[1]), trials.time)
    return gained


def exchange_three(trials: Trials, menu: Menu, limits: Limits) -> bool:
    """Give three units at once the best choices, in place, where EFFORT allows all triples; whether that gained anything."""
    count, gained = len(trials.places), False
    if not 3 <= count or comb(count, 3) * len(menu.choices) ** 3 > EFFORT:
        return False
    for first, second, third in combinations(trials.places, 3):
        exact = limits.is_exact(trials.at(first))
        for choice in (menu.uncompressed if exact else menu.everything).tolist():
            before, time = trials.choice(first), trials.time
            trials.replace(first, choice)
            if _best_of_two(trials, limits, (second, third), (menu.everything, menu.everything), time):
                gained = True
            else:
                trials.replace(first, before)
    return gained


def _best_of_two(trials: Trials, limits: Limits, places: tuple[int, int], choices: tuple[Chosen, Chosen], than_s: float) -> bool:
    """Give two units the best choices for both, in place, if F(S) is then below `than_s`; whether it is."""
    best = None
    for group in limits.allowed_pairs(trials, places, choices):
        if len(group[0]) and len(group[1]):
            pair = trials.best_pair(*places, group, below=than_s * (1 - ROUNDING))
            if pair is not None:
                best, than_s = pair, trials.time_with_all(list(zip(places, pair, strict=True)))
    if best is not None:
        trials.replace_all(list(zip(places, best, strict=True)))
    return best is not None


def kick(trials: Trials, menu: Menu, limits: Limits, tries: int) -> bool:
    """Hold one unit at another choice and improve the others around it, in place if that gains; whether it did.

    Out of a local optimum that no change of two units leaves. The choices that alone would cost least are tried first.
    """
    if tries == 0:
        return False
    moves = []
    for place in trials.places:
        for choice in limits.allowed(trials, place, menu.front(trials.at(place).numel)).tolist():
            if choice != trials.choice(place):
                moves.append((trials.time_with(place, choice), place, choice))
    for _, place, choice in sorted(moves)[:tries]:
        other = trials.copy()
        other.replace(place, choice)
        descend(other, menu, limits, held=place)
        descend(other, menu, limits)
        if other.time < trials.time * (1 - ROUNDING):
            trials.replace_all([(at, other.choice(at)) for at in other.places])
            return True
    return False


def polish(trials: Trials, menu: Menu, limits: Limits) -> None:
    """Give every unit the best choice of all that there are, not only of those on the front, in place."""
    for place in by_size(trials):
        choices = limits.allowed(trials, place, menu.everything)
        _, choice = trials.best(place, choices, below=trials.time * (1 - ROUNDING))
        if choice >= 0:
            trials.replace(place, choice)


def drop_idle(trials: Trials, menu: Menu) -> None:
    """Send units uncompressed again, in place, whose compression no longer saves time, smallest first; F(S) does not rise."""
    for place in reversed(by_size(trials)):
        if trials.at(place).option.compresses:
            _, choice = trials.best(place, menu.uncompressed, below=trials.time * (1 + ROUNDING))
            if choice >= 0:
                trials.replace(place, choice)


def by_size(trials: Trials) -> list[int]:
    """Places in descending order of size, among equal sizes the later in backward first (see decide.py)."""
    return sorted(trials.places, key=lambda place: (-trials.at(place).numel, -place))
