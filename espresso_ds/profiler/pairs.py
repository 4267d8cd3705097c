"""Who sends to whom so that a slow host or link shows, and which of them the rates accuse. Bookkeeping without communication."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from statistics import median_high
from typing import NamedTuple

from .measure import FAR

_MOST_FOR_ALL = 8
_SEED = 20230508

Pair = tuple[int, int]
"""Numbers of the sending and the receiving host."""


class Ends(NamedTuple):
    """The best rates of one host, to and from any other, in bytes per second."""

    up: float
    down: float


def host_pairs(hosts: int) -> list[Pair]:
    """Pairs of hosts, the smaller number first: all of up to 8 hosts, else a ring and as many random others, always the same."""
    if hosts <= _MOST_FOR_ALL:
        return [(a, b) for a in range(hosts) for b in range(a + 1, hosts)]
    ring = {(a, a + 1) for a in range(hosts - 1)} | {(0, hosts - 1)}
    draw, others = random.Random(_SEED), set[Pair]()
    while len(others) < hosts:
        a, b = sorted(draw.sample(range(hosts), 2))
        if (a, b) not in ring:
            others.add((a, b))
    return sorted(ring | others)


def rounds_of(pairs: Iterable[Pair]) -> list[list[Pair]]:
    """The pairs in both directions, in rounds in which a host takes part once at most, so that those of a round run together."""
    rounds: list[list[Pair]] = []
    for pair in pairs:
        free = next((each for each in rounds if not any(set(pair) & set(other) for other in each)), None)
        if free is None:
            rounds.append(free := [])
        free.append(pair)
    return [way for each in rounds for way in (each, [(b, a) for a, b in each])]


def ends_of(rates: Mapping[Pair, float], hosts: int) -> list[Ends]:
    """Every host's best rates. A pair can be slow through either end, a host only if no pair of its is quick."""
    return [
        Ends(
            up=max(rate for (sender, _), rate in rates.items() if sender == host),
            down=max(rate for (_, receiver), rate in rates.items() if receiver == host),
        )
        for host in range(hosts)
    ]


def slow_against_median(values: Mapping[int, float]) -> dict[int, float]:
    """Those that are more than `FAR` times slower than the (upper) median, with that factor."""
    middle = median_high(values.values())
    return {key: middle / value for key, value in values.items() if value * FAR < middle}


def slow_links(rates: Mapping[Pair, float], ends: list[Ends]) -> dict[Pair, float]:
    """Pairs more than `FAR` times slower than both their hosts manage elsewhere, with that factor.

    Of two hosts there is no elsewhere: the one direction is compared with the other.
    """
    found = {}
    for (sender, receiver), rate in rates.items():
        able = min(ends[sender].up, ends[receiver].down) if len(ends) > 2 else rates[receiver, sender]
        if rate * FAR < able:
            found[sender, receiver] = able / rate
    return found
