"""Cutting large compressed units into chunks: the one size for the plan that makes the step shortest.

A unit's compression, transfer and decompression follow each other; in chunks they overlap. What is sent uncompressed gains
nothing. Found after all else is decided, since it changes how long a unit takes far less than its option does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..core.chunks import chunk_lengths
from ..core.profile import ModelTrace
from .menu import Menu
from .timeline import Unit
from .trials import Trials

SIZES = (None, 1 << 22, 1 << 21, 1 << 20, 1 << 19)
"""Elements per chunk. Smaller ones cost more latency and codec calls than they hide."""
WORTHWHILE = 0.002
"""Least share of the step that cutting finer must save."""


def chunked(units: Sequence[Unit], chunk_numel: int | None, world_size: int) -> list[Unit]:
    """The units in plan order with every large compressed one replaced by its chunks."""
    return [
        replace(unit, numel=length)
        for unit in units
        for length in chunk_lengths(unit.numel, chunk_numel if unit.option.compresses else None, world_size)
    ]


def best_chunk(units: Sequence[Unit], trace: ModelTrace, menu: Menu) -> int | None:
    """The size with the least F(S), or a larger one that is hardly worse."""
    times = {size: Trials(chunked(units, size, menu.costs.world), trace, menu).time for size in SIZES}
    enough = min(times.values()) * (1 + WORTHWHILE)
    return next(size for size, time in times.items() if time <= enough)
