"""How many threads codecs on the CPU work with: the same while they are profiled and in training."""

from __future__ import annotations

import os

import torch

from . import native


def use_threads(device: str, ranks_per_node: int, compute_threads: int | None = None) -> int:
    """Set, for this process, and return the number of threads of codecs on the CPU.

    Where the model computes on the CPU too, codecs get as many threads as it has: more would be in its way. Otherwise the ranks
    of a node share its cores. What codec work costs the computing beside it is in the profile (`contention`).

    Args:
        device: where the model computes, "cpu" or "cuda".
        ranks_per_node: ranks of a node.
        compute_threads: of the model; torch's present number if not given.
    """
    if device == "cpu":
        count = compute_threads or torch.get_num_threads()
    else:
        count = max(1, (os.cpu_count() or 1) // ranks_per_node)
    native.use_threads(count)
    return count
