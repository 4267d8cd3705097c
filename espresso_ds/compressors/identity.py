"""Identity: the tensor as it is.

No error. Payload: 4 n bytes. It lets every scheme be run and tested without loss, and payloads may be summed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Codec


@dataclass(frozen=True)
class Identity(Codec):
    """Raw fp32."""

    name = "identity"
    contractive = True
    sum_dtype = torch.float32

    def payload_nbytes(self, numel: int) -> int:
        """4 n."""
        return 4 * numel

    def encode(self, x: Tensor, payload: Tensor, seed: int, error: Tensor | None = None) -> None:
        """Copy."""
        payload.view(torch.float32).copy_(x)
        if error is not None:
            torch.sub(x, x, out=error)  # zero, and NaN where x is not finite

    def decode_add(self, payload: Tensor, out: Tensor, seed: int) -> None:
        """Add."""
        out.add_(payload.view(torch.float32))
