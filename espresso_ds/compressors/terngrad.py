"""TernGrad (Wen et al., "TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep Learning", NeurIPS 2017,
equation 1): -s, 0 or s, with s the largest magnitude of each block of 512 elements (the paper: of each layer).

decode = s * sign(p) * b, b = 1 with probability |p| / s. Unbiased; E |p - decode|^2 = s |p|_1 - |p|^2 <= (sqrt(512) - 1)
|p|^2 in each block, so not contractive: for use without error feedback. Error per element: less than s. The paper's clipping
of the gradient, which is biased, is left to the optimizer.

Payload: 4 ceil(n / 512) + 2 ceil(n / 8) bytes: s (fp32), two bits per element.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .stochastic import StochasticQuantizer


@dataclass(frozen=True)
class TernGrad(StochasticQuantizer):
    """Two bits per element."""

    name = "terngrad"
    bits = 2

    def _norms(self, rows: Tensor) -> Tensor:
        return rows.abs().amax(1)
