"""Cutting large compressed units into chunks, so that compressing, sending and decompressing them overlap.

A unit's compression, transfer and decompression follow each other; those of its chunks do not. What is sent uncompressed gains
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..core.profile import ModelTrace
from .cost import Resource
from .improve import descend
from .limits import Limits
from .menu import NO_CODEC, Chosen, Menu
from .timeline import Unit
from .trials import Trials

SIZES = tuple(2**power for power in range(24, 18, -1))
"""Elements per chunk. Smaller ones cost more latency and codec calls than they hide."""
MOST = 64
"""Chunks of a unit."""
CHOICES = 16
"""Choices that are tried with every size."""
WORTHWHILE = 0.001
"""Least share of the step that cutting a unit must save."""


def cut_into_chunks(units: Sequence[Unit], trace: ModelTrace, menu: Menu, limits: Limits) -> list[Unit]:
    """The units with chunk sizes for those that gain by it, and the choices that then suit best; F(S) does not rise.

    Largest first, since they have most to overlap. Every size comes with the choice that suits it, since schemes whose steps
    could not overlap before may now.
    """
    best = Trials(units, trace, menu)
    for place in sorted(range(len(units)), key=lambda place: -units[place].numel):
        whole = best.at(place)
        if not whole.option.compresses or best.gain_at_most(place) < best.time * WORTHWHILE:
            continue
        for size in SIZES:
            if 2 * size <= whole.numel <= MOST * size:
                cut = replace(best.at(place), chunk_numel=size)
                trial = Trials([*best.units[:place], cut, *best.units[place + 1 :]], trace, menu)
                choices = limits.allowed(trial, place, _overlapping(menu, whole.numel))
                _, choice = trial.best(place, choices, below=best.time * (1 - WORTHWHILE))
                if choice >= 0:
                    trial.replace(place, choice)
                    best = trial
        if best.at(place).chunk_numel is not None:
            descend(best, menu, limits, held=place)
    return best.units


def _overlapping(menu: Menu, numel: int) -> Chosen:
    """The choices that take least where the work on different resources overlaps in full."""
    front = menu.front(numel)
    lossy = front[menu.codec[front] != NO_CODEC]
    busiest = menu.weigh(numel, lossy)[:, : len(Resource)].max(axis=1)
    return lossy[np.argsort(busiest, kind="stable")[:CHOICES]]
