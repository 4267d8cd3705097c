"""Identity: the tensor as it is.

No error, so unbiased and contractive. Payload: 4 n bytes. It lets every scheme be run and tested without loss, and payloads
may be summed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .spanwise import Spanwise


@dataclass(frozen=True)
class Identity(Spanwise):
    """Raw fp32."""

    name = "identity"
    unbiased = True
    contractive = True
    sum_dtype = torch.float32

    def payload_nbytes(self, numel: int) -> int:
        """4 n."""
        return 4 * numel

    def _fields(self, payload: Tensor, numel: int) -> tuple[Tensor, ...]:
        return (payload.view(torch.float32),)

    def _write(self, p: Tensor, fields: tuple[Tensor, ...], span: slice, seed: int) -> None:
        fields[0][span] = p

    def _read(self, fields: tuple[Tensor, ...], span: slice) -> Tensor:
        return fields[0][span]
