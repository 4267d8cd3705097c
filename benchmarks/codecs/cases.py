"""What is timed: every codec with its feedback, and the plain renderings."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from espresso_ds.compressors.registry import CODECS, resolve
from espresso_ds.core.config import CompressorSettings
from espresso_ds.profiler.codec_speed import Arrays, Case

from . import plain

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


def rendered(arrays: Arrays, peer: plain.Plain) -> dict[str, Case]:
    """The plain rendering of what `Arrays.coded` gives."""
    numel, count, grads, sums = arrays.numel, arrays.count, arrays.grads, arrays.sums
    residuals, momenta = ([torch.zeros(numel) for _ in range(count)] for _ in range(2))
    payloads = [peer.encode(grads[i], residuals[i], momenta[i]) for i in range(count)]
    return {
        "encode": lambda i: peer.encode(grads[i % count], residuals[i % count], momenta[i % count]),
        "decode": lambda i: peer.decode(payloads[i % count], sums[i % count]),
    }
