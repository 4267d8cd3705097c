"""Deep Gradient Compression (Lin et al., ICLR 2018): TopK by sampled threshold, whose density falls while training warms up.

Section 3.3 raises the sparsity exponentially in the first epochs: 25%, 6.25%, 1.56%, 0.4%, 0.1% are sent. Here the density falls
by the same factor every optimizer step, from 25% at step 0 to `density` from step `warmup_steps` on. Momentum correction and
masking (sections 3.1, 3.2) are `encode_momentum`, which feedback "dgc" calls; its local clipping is the feedback's. Otherwise as
`topk_sampled`: error, bound and payload are its at the density of the step.
"""

from __future__ import annotations

from dataclasses import dataclass

from .topk_sampled import TopKSampled

START = 0.25
"""Density of the first step of the warm-up, if it is above the final one."""


@dataclass(frozen=True)
class DGC(TopKSampled):
    """About the share `density` of the elements that is largest, more of them in the first `warmup_steps` steps."""

    warmup_steps: int = 0

    name = "dgc"

    def at(self, step: int) -> DGC:
        """The codec of an optimizer step, counted from 0; this one after the warm-up."""
        if step >= self.warmup_steps or self.density >= START:
            return self
        return DGC(START * (self.density / START) ** (step / self.warmup_steps))
