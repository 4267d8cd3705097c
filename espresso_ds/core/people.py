"""Figures as people read them."""

from __future__ import annotations


def people_bit_per_s(rate: float) -> str:
    """`rate` for people: `950 Mbit/s`, `12.5 Gbit/s`."""
    return _in_units(rate, ("Tbit/s", 1e12), ("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3))


def people_bytes(nbytes: int) -> str:
    """`nbytes` for people: `256 B`, `4 KiB`, `16 MiB`."""
    return _in_units(nbytes, ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1))


def people_seconds(seconds: float) -> str:
    """`seconds` for people: `85 us`, `1.25 ms`, `2 s`."""
    return _in_units(seconds, ("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


def _in_units(value: float, *units: tuple[str, float]) -> str:
    """In the largest unit of which there is at least one, as three digits tell."""
    name, size = next((unit for unit in units if value >= 0.9995 * unit[1]), units[-1])
    amount = value / size
    return f"{amount:.0f} {name}" if amount >= 1000 else f"{amount:.3g} {name}"
