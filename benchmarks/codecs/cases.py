"""What is timed: every codec with its feedback, the limits of this machine's memory, and the plain renderings.

A case is a function of a number, which picks one of several sets of arrays, so that large sets are out of cache and small
ones stay in it. The limits run over the arrays that the codecs use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from espresso_ds.compressors.base import Codec, padded
from espresso_ds.compressors.registry import CODECS, make, resolve
from espresso_ds.core.config import CompressorSettings
from espresso_ds.feedback import Feedback

from . import plain

Case = Callable[[int], object]
ROWS = 4
"""Payloads that `decode_sum` adds up."""


@dataclass(frozen=True)
class Bar:
    """What the fused kernel shall reach of the rate of `r += g`: from 2^20 elements up, and from 2^14."""

    large: float
    small: float


@dataclass(frozen=True)
class Subject:
    """A codec to time, the plain rendering to compare it with, and its bar."""

    settings: CompressorSettings
    peer: plain.Plain | None = None
    bar: Bar | None = None

    @property
    def name(self) -> str:
        """Name, strength and feedback."""
        return resolve(self.settings).label.replace("error feedback", "EF")


def _of(name: str, peer: plain.Plain | None = None, bar: Bar | None = None, **parameters: object) -> Subject:
    return Subject(CompressorSettings.model_validate({"name": name, **parameters}), peer, bar)


DENSE, SPARSE = Bar(0.8, 0.5), Bar(0.6, 0.3)
FIRST = [
    _of("efsignsgd", plain.sign(), DENSE),
    _of("quantize", plain.quantize(8), DENSE, bits=8),
    _of("quantize", plain.quantize(4), DENSE, bits=4),
    _of("quantize", plain.quantize(2), DENSE, bits=2),
    _of("topk_sampled", plain.topk_sampled(0.01), SPARSE, density=0.01),
    _of("dgc", plain.dgc(0.01), SPARSE, density=0.01),
    _of("dgc", plain.dgc(0.01), SPARSE, density=0.01, residual="bfloat16"),
    _of("topk", plain.topk(0.01), density=0.01),
]
SUBJECTS = FIRST + [
    Subject(CompressorSettings(name=name)) for name in CODECS if name not in {subject.settings.name for subject in FIRST}
]


@dataclass
class Arrays:
    """`count` sets of arrays of `numel` elements: gradients, residuals, momenta and sums."""

    numel: int
    count: int
    grads: list[Tensor] = field(init=False)
    residuals: list[Tensor] = field(init=False)
    sums: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.numel)
        self.grads = [torch.randn(self.numel, generator=generator) * 1e-3 for _ in range(self.count)]
        self.residuals = [torch.zeros(self.numel) for _ in range(self.count)]
        self.sums = [torch.zeros(self.numel) for _ in range(self.count)]

    def limits(self) -> dict[str, Case]:
        """`r += g` moves 12 bytes an element; `out += 1` moves 8, as decoding does besides reading its payloads."""
        residuals, grads, sums, count = self.residuals, self.grads, self.sums, self.count
        return {
            "r += g": lambda i: residuals[i % count].add_(grads[i % count], alpha=1e-3),
            "out += 1": lambda i: sums[i % count].add_(1.0),
        }

    def coded(self, subject: Subject) -> dict[str, Case]:
        """Encoding with feedback, decoding ROWS payloads to their sum, and adding one to a sum; all arrays touched once."""
        settings = resolve(subject.settings)
        codec: Codec = make(settings).at(1 << 30)
        memory = Feedback(settings.feedback or "none", getattr(torch, settings.residual), settings.momentum, settings.clip)
        nbytes, count, grads, sums = codec.payload_nbytes(self.numel), self.count, self.grads, self.sums
        messages = [torch.empty(ROWS, padded(nbytes), dtype=torch.uint8) for _ in range(count)]
        firsts = [message[0, :nbytes] for message in messages]
        sites = [str(i) for i in range(count)]
        for i in range(count):
            for row in messages[i]:
                memory.encode(codec, grads[i], row[:nbytes], i, sites[i])
        return {
            "encode": lambda i: memory.encode(codec, grads[i % count], firsts[i % count], i, sites[i % count]),
            "decode": lambda i: codec.decode_add(firsts[i % count], sums[i % count], i),
            f"decode {ROWS}": lambda i: codec.decode_sum(messages[i % count], sums[i % count], i),
        }

    def rendered(self, peer: plain.Plain) -> dict[str, Case]:
        """The plain rendering of the same."""
        count, grads, sums = self.count, self.grads, self.sums
        residuals, momenta = ([torch.zeros(self.numel) for _ in range(count)] for _ in range(2))
        payloads = [peer.encode(grads[i], residuals[i], momenta[i]) for i in range(count)]
        return {
            "encode": lambda i: peer.encode(grads[i % count], residuals[i % count], momenta[i % count]),
            "decode": lambda i: peer.decode(payloads[i % count], sums[i % count]),
        }
