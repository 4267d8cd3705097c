"""QSGD (Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding", NeurIPS 2017, section
3.1, in buckets as in section 3.3): stochastic levels of the Euclidean norm of each bucket of 512 elements.

decode = norm * sign(p) * level / s, with s = 2**(bits - 1) - 1 levels and level = |p| s / norm rounded up or down at random.
Unbiased; E |p - decode|^2 <= w |p|^2 with w = min(512 / s^2, sqrt(512) / s) (lemma 3.1), so contractive where w < 1, which is
from 6 bits up. Error per element: less than norm / s. Codes have a fixed width, not the paper's Elias coding: sizes are known
before a step.

Payload: 4 ceil(n / 512) + bits ceil(n / 8) bytes, `bits` 2 to 8 with the sign.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .stochastic import BLOCK, StochasticQuantizer


@dataclass(frozen=True)
class QSGD(StochasticQuantizer):
    """`bits` per element, the sign included.

    Raises:
        ValueError: one bit, which holds no level beside zero.
    """

    bits: int

    name = "qsgd"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(
                f"qsgd takes 2 to 8 bits, one of them the sign, not {self.bits}; for one bit use efsignsgd or onebit"
            )

    @property
    def variance_bound(self) -> float:
        """The w above."""
        return min(BLOCK / self.levels**2, math.sqrt(BLOCK) / self.levels)

    @property
    def contractive(self) -> bool:
        """From 6 bits up."""
        return self.variance_bound < 1

    def _norms(self, rows: Tensor) -> Tensor:
        # In float64 no square overflows, or vanishes; a finite norm beyond fp32 is cut, which no element reaches.
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        largest = torch.finfo(torch.float32).max
        return torch.where(norms.isfinite(), norms.clamp(max=largest), norms).float()
