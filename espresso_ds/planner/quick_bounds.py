"""Two lower bounds of the step that take next to no time, by which the search knows when it need not look further."""

from __future__ import annotations

from collections import Counter

import numpy as np

from ..core.profile import ModelTrace
from .chunk import SIZES
from .cost import Resource
from .menu import NO_CODEC, TOLERANCE, Menu

WEIGHTS = np.concatenate([np.eye(len(Resource)), np.random.default_rng(0).dirichlet([0.7, 0.3, 0.7, 0.7], size=200)])
"""Shares of the four resources, each row adding up to 1."""
LEAST_PIECE = SIZES[-1] // 2
"""Fewest elements of the first chunk of a unit."""


def last_bound_s(trace: ModelTrace, menu: Menu) -> float:
    """No plan's step is shorter: all of backward, and after it is ready the quickest way of the last tensor.

    A unit that holds that tensor has at least as many elements and is ready no sooner; so has the first of its chunks, if it is
    compressed, unless the tensor is larger than LEAST_PIECE.
    """
    last = trace.tensors[-1]
    least = Menu(menu.catalogue, menu.costs.never_falling())
    whole = least.weigh(last.numel, least.uncompressed)
    piece = least.weigh(min(last.numel, LEAST_PIECE), least.everything[least.codec != NO_CODEC])
    quickest = np.concatenate([whole, piece])[:, : len(Resource)].sum(axis=1).min()
    return trace.forward_s + max(trace.backward_s, last.ready_s + quickest) + trace.after_s


def singles_bound_s(trace: ModelTrace, menu: Menu) -> float:
    """No strategy's step is shorter that sends every tensor by itself.

    Each resource is busy for the sum of what the tensors' choices load it with, after the first tensor is ready, the GPU with
    backward besides. A mean of these sums, with weights that add up to 1, is no more than the longest of them; and it is at least
    the sum over tensors of the least weighted load of any choice. That holds for any weights; the best of WEIGHTS counts.
    """
    start_s = trace.tensors[0].ready_s
    before = WEIGHTS @ np.array([trace.backward_s, start_s, start_s, start_s])
    work = np.zeros(len(WEIGHTS))
    for numel, count in Counter(tensor.numel for tensor in trace.tensors).items():
        loads = menu.weigh(numel, menu.front(numel))[:, : len(Resource)]
        work += count * (loads @ WEIGHTS.T).min(axis=0) / (1 + TOLERANCE)
    return trace.forward_s + float((before + work).max()) + trace.after_s
