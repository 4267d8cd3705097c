"""The flat part of the option tree: every way to synchronise one tensor over one level of the network (E 4.2, figure 8).

With d devices on which each compression and decompression may run, the paths from "gradient ready" to "gradient averaged" are

    AR                                                      1
    RS AG | RD BC                                           2
    RS C AG D | RD C BC D                                   2 d^2
    C AG D                                                  d^2
    C A2A AG D | C GA BC D                                  2 d^2
    C A2A D AG | C GA D BC                                  2 d^2
    C A2A D C AG D | C GA D C BC D                          2 d^4

which is 12 for d = 1 and 63 for d = 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

from ..core.option import Device, Option

_PATHS = (
    "AR",
    "RS AG",
    "RD BC",
    "RS C AG D",
    "RD C BC D",
    "C AG D",
    "C A2A AG D",
    "C GA BC D",
    "C A2A D AG",
    "C GA D BC",
    "C A2A D C AG D",
    "C GA D C BC D",
)
_SUMMABLE_PATHS = ("C AR D",)


def flat_options(devices: Sequence[Device]) -> tuple[Option, ...]:
    """All flat options of the paper's tree: 12 with one device, 63 with two. Uncompressed allreduce comes first.

    Args:
        devices: where compressions and decompressions may run; the order of the result follows theirs.
    """
    return tuple(_placed(_PATHS, devices))


def summable_options(devices: Sequence[Device]) -> tuple[Option, ...]:
    """`C AR D`: allreduce of payloads that may be added up, d^2 options.

    Not in the paper, whose indivisible routine for compressed tensors is allgather. Codecs whose payloads are sums' payloads
    (casts, RandomK with a shared seed) gain a routine whose traffic does not grow with the number of ranks.
    """
    return tuple(_placed(_SUMMABLE_PATHS, devices))


def _placed(paths: Iterable[str], devices: Sequence[Device]) -> Iterable[Option]:
    """Each path with every choice of devices for its codec tasks, all routines at level flat."""
    for path in paths:
        words = path.split()
        for places in product(devices, repeat=sum(word in "CD" for word in words)):
            place = iter(places)
            yield Option.parse(" ".join(f"{word}.{next(place) if word in 'CD' else 'flat'}" for word in words))
