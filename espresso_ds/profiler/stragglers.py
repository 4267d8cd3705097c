"""Measures what single hosts and links can do: point to point in both directions, and one fixed piece of computing."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, median_high

import torch

from ..core.profile import Link
from .computing import multiply
from .measure import FAR, Progress, part
from .pairs import Pair, host_pairs, rounds_of, slow_against_median
from .probes import Buffers, align, largest
from .rendezvous import Ranks

_SEND_S = 0.04
_LEAST_NBYTES, _MOST_NBYTES, _MESSAGE_NBYTES = 1 << 18, 1 << 24, 1 << 20
_PASSES = 3
_PRODUCTS = {"cpu": 8, "cuda": 1000}
_COMPUTE_PASSES, _COMPUTE_PASSES_ALONE = 5, 10


@dataclass(frozen=True)
class Abilities:
    """Bytes per second from host to host, and every host's products of matrices per second."""

    rates: Mapping[Pair, float]
    products_per_s: Sequence[float]


def measure_abilities(ranks: Ranks, link: Link | None, buffers: Buffers, progress: Progress) -> Abilities:
    """Measure both; collective, and alike on all ranks.

    Disjoint pairs send at the same time, as all hosts do in training. What then looks slow is measured again alone, so that
    nobody is accused of what its neighbours did. Computing is the best of some runs, on all ranks at once.

    Args:
        ranks: all of them; the first rank of a host sends and receives for it.
        link: between two hosts, which says how much to send; None on a single host.
        buffers: memory to send from.
        progress: told the share of this part.
    """
    rates = {} if link is None else _rates(ranks, link, buffers, part(progress, 0.0, 0.9))
    progress(0.9, "computing")
    every = range(len(ranks.hosts))
    seconds = _compute(ranks, every, _COMPUTE_PASSES)
    suspects = slow_against_median({host: 1 / spent for host, spent in enumerate(seconds)})
    for host in sorted(suspects):  # one after the other: emulated hosts share their cores
        seconds[host] = min(seconds[host], _compute(ranks, [host], _COMPUTE_PASSES_ALONE)[host])
    progress(1.0, "computing")
    return Abilities(rates, [_PRODUCTS[ranks.device.type] / spent for spent in seconds])


def _rates(ranks: Ranks, link: Link, buffers: Buffers, progress: Progress) -> dict[Pair, float]:
    nbytes = _MOST_NBYTES if not link.beta_s_per_byte else _sent_in(_SEND_S, 1 / link.beta_s_per_byte)
    rounds = rounds_of(host_pairs(len(ranks.hosts)))
    samples: dict[Pair, list[float]] = {pair: [] for each in rounds for pair in each}
    for number in range(_PASSES):
        for place, each in enumerate(rounds):
            progress((number + place / len(rounds)) / (_PASSES + 1), "hosts pairwise")
            for pair, rate in _send(ranks, each, nbytes, buffers).items():
                samples[pair].append(rate)
    rates = {pair: median(found) for pair, found in samples.items()}
    usual = median_high(rates.values())
    suspects = sorted(pair for pair, rate in rates.items() if rate * FAR < usual)
    for place, pair in enumerate(suspects):
        progress((_PASSES + place / len(suspects)) / (_PASSES + 1), "slow pairs again, alone")
        alone = [_send(ranks, [pair], _sent_in(_SEND_S, rates[pair]), buffers)[pair] for _ in range(_PASSES)]
        rates[pair] = median(alone)
    return rates


def _sent_in(seconds: float, bytes_per_s: float) -> int:
    return max(_LEAST_NBYTES, min(_MOST_NBYTES, int(seconds * bytes_per_s)))


def _send(ranks: Ranks, pairs: Sequence[Pair], nbytes: int, buffers: Buffers) -> dict[Pair, float]:
    """Rates of disjoint pairs that send `nbytes` at once, in messages; before the clock starts, one uses up a shaper's credit."""
    seconds = [0.0] * len(pairs)
    message = buffers.given[: min(nbytes, _MESSAGE_NBYTES, len(buffers.given))]
    answer = torch.zeros(1, dtype=torch.uint8, device=ranks.device)
    count = max(1, nbytes // len(message))
    align(ranks)
    for place, hosts in enumerate(pairs):
        sender, receiver = (host * ranks.ranks_per_node for host in hosts)
        if ranks.rank == sender:
            for messages in (1, count):
                begin = time.perf_counter()
                for _ in range(messages):
                    ranks.group.send([message], receiver, 0).wait()
                ranks.group.recv([answer], receiver, 0).wait()
                seconds[place] = time.perf_counter() - begin
        elif ranks.rank == receiver:
            for messages in (1, count):
                for _ in range(messages):
                    ranks.group.recv([message], sender, 0).wait()
                ranks.group.send([answer], sender, 0).wait()
    return {pair: count * len(message) / spent for pair, spent in zip(pairs, largest(ranks, seconds), strict=True)}


def _compute(ranks: Ranks, hosts: Collection[int], passes: int) -> list[float]:
    """Seconds of the fixed products on the slowest rank of each of `hosts`, in the best of the passes; 0 for the others."""
    here = ranks.rank // ranks.ranks_per_node
    found = []
    for _ in range(passes):
        align(ranks)
        seconds = [0.0] * len(ranks.hosts)
        if here in hosts:
            seconds[here] = multiply(_PRODUCTS[ranks.device.type], ranks.device)
        found.append(largest(ranks, seconds))
    return [min(each) for each in zip(*found, strict=True)]
