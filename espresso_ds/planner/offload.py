"""Algorithm 2: which of the compressed tensors to compress on CPUs instead (E 4.4, Lemma 1).

| E, Algorithm 2                                             | here                                                             |
|------------------------------------------------------------|------------------------------------------------------------------|
| group the compressed tensors by (size, option)             | `groups`                                                         |
| in group i offload the u_i farthest from the output layer  | the last u_i in the order of backward, from which the output     |
|                                                            | layer is farthest                                                |
| all combinations of u_i, the one with the least F(S)       | `product`, as long as there are at most MOST of them             |

Deviation: beyond MOST combinations the u_i are searched one after the other, each over all its values, until none gains. The
paper counts on there being few groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

from ..core.option import Action, Device, Option
from .menu import Choice, Menu
from .trials import ROUNDING, Trials

MOST = 1_000
"""Combinations that are all tried in a search, which keeps it in milliseconds."""


def offloaded(option: Option) -> Option:
    """The option with all its compressions and decompressions on the CPU."""
    return Option(tuple(Action(a.task, Device.CPU) if isinstance(a.at, Device) else a for a in option.actions))


def groups(trials: Trials, menu: Menu) -> list[list[tuple[int, int]]]:
    """Compressed units by size and choice as (place, choice if offloaded), those last in backward first."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for place in reversed(trials.places):
        unit = trials.at(place)
        on_cpu = menu.place.get(Choice(offloaded(unit.option), unit.codec))
        if unit.option.compresses and on_cpu is not None and on_cpu != trials.choice(place):
            found.setdefault((unit.numel, trials.choice(place)), []).append((place, on_cpu))
    return list(found.values())


def algorithm_2(trials: Trials, menu: Menu, most: int = MOST) -> Trials:
    """Offload the compression of some units in place; F(S) does not rise. Returns the same trials.

    Args:
        trials: what Algorithm 1 gave.
        menu: what the choices cost.
        most: combinations that are all tried; beyond, the u_i are searched one after the other.
    """
    sets = groups(trials, menu)
    if not sets:
        return trials
    if prod(len(members) + 1 for members in sets) > most:
        counts = _one_by_one(trials, sets)
    else:
        counts = _all(trials, sets)
    trials.replace_all(_offloads(sets, counts))
    return trials


def _offloads(sets: Sequence[Sequence[tuple[int, int]]], counts: Sequence[int]) -> list[tuple[int, int]]:
    return [change for members, count in zip(sets, counts, strict=True) for change in members[:count]]


def _all(trials: Trials, sets: Sequence[Sequence[tuple[int, int]]]) -> Sequence[int]:
    best, least = tuple(0 for _ in sets), trials.time * (1 - ROUNDING)
    for counts in product(*(range(len(members) + 1) for members in sets)):
        time = trials.time_with_all(_offloads(sets, counts), least)
        if time < least:
            best, least = counts, time
    return best


def _one_by_one(trials: Trials, sets: Sequence[Sequence[tuple[int, int]]]) -> Sequence[int]:
    counts, least = [0] * len(sets), trials.time * (1 - ROUNDING)
    gained = True
    while gained:
        gained = False
        for index, members in enumerate(sets):
            for count in range(len(members) + 1):
                trial = [*counts[:index], count, *counts[index + 1 :]]
                time = trials.time_with_all(_offloads(sets, trial), least)
                if time < least:
                    counts, least, gained = trial, time * (1 - ROUNDING), True
    return counts
