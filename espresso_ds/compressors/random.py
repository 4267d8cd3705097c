"""Random numbers by counter: the number at an index follows from the seed and the index alone, by arithmetic on 64-bit integers.

So encoding in spans, in threads, on any device, or in a kernel of another language draws the same numbers, and decoding draws
them again. This is SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014), started for
each seed where its own output for that seed says, so that the streams of seeds 1, 2, 3 ... do not run into each other.
Modulo 2**64:

    mix(z):  z ^= z >> 30;  z *= 0xBF58476D1CE4E5B9;  z ^= z >> 27;  z *= 0x94D049BB133111EB;  z ^= z >> 31
    g = 0x9E3779B97F4A7C15
    output(j) = mix(mix(seed + g) + (j + 1) g)
    words 2 j and 2 j + 1 = low and high half of output(j)

Not for cryptography.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FULL = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
"""Shift by which a number is folded onto itself, and what it is then multiplied by."""


def words(seed: int, start: int, numel: int, device: torch.device | str = "cpu") -> Tensor:
    """Uniform 32-bit words of the indices start .. start + numel - 1: int32, shape (numel,); `seed` in [0, 2**64)."""
    first, end = start // 2, (start + numel + 1) // 2
    z = torch.arange(first + 1, end + 1, device=device).mul_(_signed(_GOLDEN)).add_(_signed(_start(seed)))
    folded = torch.empty_like(z)
    for shift, factor in _MIX:
        # torch shifts int64 arithmetically: the mask makes it the logical shift.
        torch.bitwise_right_shift(z, shift, out=folded).bitwise_and_(_FULL >> shift)
        z.bitwise_xor_(folded)
        if factor != 1:
            z.mul_(_signed(factor))
    return z.view(torch.int32)[start % 2 : start % 2 + numel]


def uniform(seed: int, start: int, numel: int, device: torch.device | str = "cpu") -> Tensor:
    """The upper 24 bits of `words` as multiples of 2**-24 in [0, 1): float32, shape (numel,)."""
    return (words(seed, start, numel, device) >> 8).bitwise_and_(2**24 - 1).float().mul_(2.0**-24)


def _signed(word: int) -> int:
    """64 bits in two's complement, as torch takes them for an int64."""
    return (word + 2**63) % 2**64 - 2**63


def _start(seed: int) -> int:
    """mix(seed + g)."""
    z = (seed + _GOLDEN) & _FULL
    for shift, factor in _MIX:
        z = (z ^ (z >> shift)) * factor & _FULL
    return z
