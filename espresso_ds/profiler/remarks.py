"""What a person should know about a cluster before trusting a plan for it: stragglers, asymmetric links, unrest, unlike hosts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median_high

from ..core.hosts import ClusterKind
from ..core.option import Level
from ..core.people import people_bit_per_s
from ..core.profile import Link
from .pairs import Pair, ends_of, slow_against_median, slow_links
from .stragglers import Abilities

LOUD_SPREAD = 0.25
"""Interquartile range over median, of the largest size of a link, beyond which predictions are not to be trusted."""


def remarks(hosts: Sequence[str], able: Abilities, links: Mapping[Level, Link], kind: ClusterKind | None) -> Iterator[str]:
    """One sentence for each thing out of the ordinary, with its figures and what to do about it.

    Args:
        hosts: names.
        able: what was measured of hosts and pairs of them.
        links: with the spreads of their measurement.
        kind: what the hosts are made of, where that is known.
    """
    for level, link in links.items():
        if link.spread and link.spread[-1] > LOUD_SPREAD:
            yield (
                f"RESTLESS: the {level} link's bandwidth spreads by {link.spread[-1]:.0%} from pass to pass, so predictions made "
                "from it are uncertain: profile again when nothing else uses hosts and network"
            )
    if len(hosts) > 2:  # of two, neither can be told from the link between them
        ends = ends_of(able.rates, len(hosts))
        yield from _slow_ends(hosts, [end.up for end in ends], "sends")
        yield from _slow_ends(hosts, [end.down for end in ends], "receives")
    if len(hosts) > 1:
        yield from _slow_links(hosts, able.rates)
    for host, factor in slow_against_median(dict(enumerate(able.products_per_s))).items():
        yield (
            f"{hosts[host]} computes {factor:.1f}x slower than the median host, and every step waits for it: look for other "
            "work, heat or a power limit there, or leave it out"
        )
    if kind is not None and len(kind.hosts) > 1:
        yield f"hosts are not alike, and every step waits for the slowest: {kind.label}"


def _slow_ends(hosts: Sequence[str], rates: Sequence[float], verb: str) -> Iterator[str]:
    middle = people_bit_per_s(8 * median_high(rates))
    for host, factor in slow_against_median(dict(enumerate(rates))).items():
        yield (
            f"{hosts[host]} {verb} at {people_bit_per_s(8 * rates[host])}, {factor:.1f}x slower than the median host ({middle}), "
            "and routines go at its pace: look at its cable, port, driver and other traffic, or leave it out"
        )


def _slow_links(hosts: Sequence[str], rates: Mapping[Pair, float]) -> Iterator[str]:
    for (sender, receiver), factor in slow_links(rates, ends_of(rates, len(hosts))).items():
        than = "both manage elsewhere" if len(hosts) > 2 else "the other way"
        yield (
            f"the link {hosts[sender]} -> {hosts[receiver]} carries {people_bit_per_s(8 * rates[sender, receiver])}, "
            f"{factor:.1f}x less than {than}: look at the route between them"
        )
