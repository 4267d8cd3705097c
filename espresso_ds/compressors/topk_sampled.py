"""TopK by sampled threshold (Lin et al., "Deep Gradient Compression", ICLR 2018, section 5): about the k largest, never more.

One pass: what reaches a threshold guessed from a sample is listed, and the k largest of the list are sent, ties going to the
lowest index. Of normal data fewer than k reach it in 2 to 8 tensors of a hundred: then 5% fewer are sent, at worst a tenth for k
in the thousands and a third for k = 164. A sample that misleads costs elements sent (too high a guess) or time (too low), never
correctness. Deterministic.

Biased, contractive: |p - decode|^2 <= (1 - (1 - 2^-16) m/n) |p|^2 for elements in bf16's normal range, where m = min(k, r) and r
is the rank in the sample of `threshold.sampling`, about 100 at usual densities: so many elements of the sample alone
reach the guess. (If fewer of the sample are not zero, all that is not zero is listed, and TopK's bound holds.) That is for the
worst of data; mostly m is within a few percent of k. Payload: as TopK's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .topk import TopK


@dataclass(frozen=True)
class TopKSampled(TopK):
    """About the share `density` of the elements that is largest in magnitude, never more."""

    name = "topk_sampled"
    exact: ClassVar[bool] = False
