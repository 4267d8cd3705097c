"""Figures as people read them."""

from __future__ import annotations


def people_bit_per_s(rate: float) -> str:
    """`rate` for people: `950 Mbit/s`, `12.5 Gbit/s`."""
    for unit, size in (("Tbit/s", 1e12), ("Gbit/s", 1e9), ("Mbit/s", 1e6)):
        if rate >= size:
            return f"{rate / size:.3g} {unit}"
    return f"{rate / 1e3:.3g} kbit/s"


def people_bytes(nbytes: int) -> str:
    """`nbytes` for people: `256 B`, `4 KiB`, `16 MiB`."""
    for unit, size in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes} B"


def people_seconds(seconds: float) -> str:
    """`seconds` for people: `85 us`, `1.25 ms`, `2 s`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
