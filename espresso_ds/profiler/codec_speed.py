"""Codecs and the limits of memory, timed over the same arrays in the same run: for `espresso bench codec` and benchmarks/codecs.

A case is a function of a number, which picks one of several sets of arrays, so that large sets are out of cache and small ones
stay in it. Every repeat runs all cases once, in turn, so that a disturbance hits them alike; a ratio is the median of each
repeat's own ratio.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..compressors.base import Codec, padded
from ..compressors.registry import make, resolve
from ..core.config import CompressorSettings
from ..feedback import Feedback

Case = Callable[[int], object]

ADD, COPY, INCREMENT = "r += g", "copy", "out += 1"
_HANDLED = 1 << 22
"""Elements that a case handles within one repeat, so that it takes longer than a clock's tick."""
_MOST = 256
"""Sets of arrays, and calls within a repeat, however small the arrays are."""
_WARM = 1 << 30
"""A step past any warm-up of a codec's density."""


@dataclass
class Arrays:
    """`count` sets of float32 arrays of `numel` elements on one device, all touched: gradients, residuals and sums."""

    numel: int
    count: int
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    grads: list[Tensor] = field(init=False)
    residuals: list[Tensor] = field(init=False)
    sums: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.numel)
        self.grads = [(torch.randn(self.numel, generator=generator) * 1e-3).to(self.device) for _ in range(self.count)]
        self.residuals = [torch.zeros(self.numel, device=self.device) for _ in range(self.count)]
        self.sums = [torch.zeros(self.numel, device=self.device) for _ in range(self.count)]

    def limits(self) -> dict[str, Case]:
        """`r += g` moves 12 bytes an element; a copy and `out += 1` move 8, as decoding does besides reading its payloads."""
        residuals, grads, sums, count = self.residuals, self.grads, self.sums, self.count
        return {
            ADD: lambda i: residuals[i % count].add_(grads[i % count], alpha=1e-3),
            COPY: lambda i: residuals[i % count].copy_(grads[i % count]),
            INCREMENT: lambda i: sums[i % count].add_(1.0),
        }

    def coded(self, settings: CompressorSettings, rows: int = 1) -> dict[str, Case]:
        """Encoding with feedback, decoding onto a sum, and, of more than one row, decoding `rows` payloads to their sum."""
        settings = resolve(settings)
        codec: Codec = make(settings).at(_WARM)
        memory = Feedback(settings.feedback or "none", getattr(torch, settings.residual), settings.momentum, settings.clip)
        nbytes, count, grads, sums = codec.payload_nbytes(self.numel), self.count, self.grads, self.sums
        messages = [torch.empty(rows, padded(nbytes), dtype=torch.uint8, device=self.device) for _ in range(count)]
        firsts = [message[0, :nbytes] for message in messages]
        sites = [str(i) for i in range(count)]
        for i in range(count):
            for row in messages[i]:
                memory.encode(codec, grads[i], row[:nbytes], i, sites[i])
        cases: dict[str, Case] = {
            "encode": lambda i: memory.encode(codec, grads[i % count], firsts[i % count], i, sites[i % count]),
            "decode": lambda i: codec.decode_add(firsts[i % count], sums[i % count], i),
        }
        if rows > 1:
            cases[f"decode {rows}"] = lambda i: codec.decode_sum(messages[i % count], sums[i % count], i)
        return cases


def sets_of(numel: int, spread: int) -> int:
    """How many sets of arrays of `numel` elements hold `spread` elements of each kind; at most 256."""
    return max(1, min(_MOST, spread // numel))


def one_repeat(cases: Mapping[str, Case], numel: int, clock: Callable[[], float]) -> dict[str, float]:
    """Mean seconds per call of every case, each run several times after one untimed call."""
    calls = sets_of(numel, _HANDLED)
    seconds = {}
    for name, run in cases.items():
        run(0)
        start = clock()
        for i in range(calls):
            run(i)
        seconds[name] = (clock() - start) / calls
    return seconds


def ratio(above: Iterable[float], below: Iterable[float]) -> float:
    """Median of the repeats' own ratios."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
