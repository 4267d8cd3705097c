"""RandomK with a seed shared by all ranks (Stich et al., "Sparsified SGD with Memory", NeurIPS 2018): k elements, values only.

The seed fixes the indices on every rank, so no index travels and payloads may be summed. The sample is stratified: [0, n) is
cut into k strata of floor or ceil(n / k) elements and one element is drawn from each. Every element is kept with probability
1 / |its stratum|, about k / n, as in a uniform sample; the indices are distinct and sorted by construction and cost O(k),
where a uniform sample costs O(n) or a hash set.

Values are sent unscaled, thus biased (scaled by n / k they would be unbiased, but not contractive) and contractive in the mean:
E |x - decode|^2 <= (1 - 1/ceil(n/k)) |x|^2. A single draw may keep only zeros. Meant for error feedback.
Payload: 4 k bytes, k = max(1, round(density n)).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Codec
from .bits import all_finite
from .topk import kept


@dataclass(frozen=True)
class RandomK(Codec):
    """A share `density` of the elements, drawn anew for every seed."""

    density: float

    name = "randomk"
    contractive = True
    sum_dtype = torch.float32

    def payload_nbytes(self, numel: int) -> int:
        """4 k."""
        return 4 * kept(self.density, numel)

    def encode(self, x: Tensor, payload: Tensor, seed: int, error: Tensor | None = None) -> None:
        """Gather. NaN or Inf among the elements not drawn would stay unseen, so the first value is then made NaN."""
        index = stratified(x.numel(), kept(self.density, x.numel()), seed).to(x.device)
        values = torch.index_select(x, 0, index, out=payload.view(torch.float32))
        if not all_finite(x):
            values[0] = torch.nan
        if error is not None:
            if error is not x:
                error.copy_(x)
            error.index_add_(0, index, values, alpha=-1)

    def decode_add(self, payload: Tensor, out: Tensor, seed: int) -> None:
        """Draw the same indices and scatter."""
        index = stratified(out.numel(), kept(self.density, out.numel()), seed).to(out.device)
        out.index_add_(0, index, payload.view(torch.float32))


def stratified(numel: int, k: int, seed: int) -> Tensor:
    """Return k distinct sorted indices (int64) below `numel`, one from each of k strata; the same on every rank and device.

    They are always drawn on the CPU, by torch's Mersenne Twister: device generators differ from each other.
    """
    # Stratum j starts at floor(j * numel / k), written without the product, which would overflow int64 for huge tensors.
    width, extra = divmod(numel, k)
    j = torch.arange(k + 1)
    start = j * width + j * extra // k
    # float64 in [0, 1) times a length below 2**52 rounds to less than the length, so a draw never leaves its stratum.
    draw = torch.rand(k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return start[:-1] + (draw * start.diff()).long()
