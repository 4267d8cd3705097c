"""RandomK with a seed shared by all ranks (Stich et al., "Sparsified SGD with Memory", NeurIPS 2018): k elements, values
only.

The seed fixes the indices on every rank, so no index travels and payloads may be summed. The sample is stratified: [0, n) is
cut into k strata of floor or ceil(n / k) elements and one element is drawn from each. Every element is kept with probability
1 / |its stratum|, about k / n, as in a uniform sample; the indices are distinct and sorted by construction and cost O(k),
where a uniform sample costs O(n) or a hash set.

Values are sent unscaled, thus biased (scaled by n / k they would be unbiased, but not contractive) and contractive in the
mean: E |p - decode|^2 <= (1 - 1/ceil(n/k)) |p|^2. A single draw may keep only zeros. Error per element: 0 or |p|. Meant for
error feedback. Payload: 4 k bytes, k = max(1, round(density n)).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import random
from .base import Codec
from .spanwise import keep, poison, spans
from .topk import kept as count_kept


@dataclass(frozen=True)
class RandomK(Codec):
    """A share `density` of the elements, drawn anew for every seed."""

    density: float

    name = "randomk"
    contractive = True
    sum_dtype = torch.float32
    shared_seed = True

    def payload_nbytes(self, numel: int) -> int:
        """4 k."""
        return 4 * count_kept(self.density, numel) if numel else 0

    def encode(self, x: Tensor, payload: Tensor, seed: int, residual: Tensor | None = None, kept: Tensor | None = None) -> None:
        """Gather. NaN or Inf among the elements not drawn would stay unseen, so the first value is then made NaN."""
        if x.numel() == 0:
            return
        values = payload.view(torch.float32)
        index = stratified(x.numel(), values.numel(), seed, x.device)
        torch.index_select(x, 0, index, out=values)
        if residual is not None:
            values.add_(residual[index])
        for span in spans(x):
            p = x[span] if residual is None else x[span] + residual[span]
            values[:1].add_(poison(p))
            if kept is not None:
                keep(p, kept[span])
        if kept is not None:
            kept[index] = 0.0

    def decode_add(self, payload: Tensor, out: Tensor, seed: int) -> None:
        """Draw the same indices and scatter."""
        if out.numel() == 0:
            return
        values = payload.view(torch.float32)
        out.index_add_(0, stratified(out.numel(), values.numel(), seed, out.device), values)


def stratified(numel: int, k: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Return k distinct sorted indices (int64) below `numel`, one from each of k strata; the same on every rank and device."""
    # Stratum j starts at floor(j * numel / k), written without the product, which would overflow int64 for huge tensors.
    width, extra = divmod(numel, k)
    j = torch.arange(k + 1, device=device)
    start = j * width + j * extra // k
    # In float64, 32 random bits times a length below 2**21 are exact, and longer ones round to less than the length.
    draw = (random.words(seed, 0, k, device).double() + 2.0**31) * 2.0**-32
    return start[:-1] + (draw * start.diff()).long()
