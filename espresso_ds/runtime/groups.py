"""The process groups of a rank: for each lane all ranks, those of its node, or those with its place on every node."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup

from ..core.option import Level, Option
from .paths import Place

Key = tuple[int, Level]
"""A lane and a level."""


@dataclass(frozen=True)
class Groups:
    """`by_lane` has the group for the k-th routine of an option, if that is on this level, so that calls on a group come in plan
    order on all its ranks; `place` says which rank this is.
    """

    place: Place
    by_lane: dict[Key, ProcessGroup]

    def close(self, destroy: bool = True) -> None:
        """Let go of the groups, whose threads must not outlive the interpreter (gloo aborts).

        Args:
            destroy: tell torch.distributed too, which is collective; False where that has been torn down already.
        """
        if destroy:
            for group in self.by_lane.values():
                dist.destroy_process_group(group)
        self.by_lane.clear()


def needed(options: Iterable[Option]) -> list[Key]:
    """The lanes and levels that the options' routines run on, in one order on all ranks."""
    keys: set[Key] = set()
    for option in options:
        levels = (action.at for action in option.actions if isinstance(action.at, Level))
        keys.update(enumerate(levels))
    return sorted(keys)


def make(
    place: Place, options: Iterable[Option], backend: str, timeout_s: float, clusters: Sequence[Place] | None = None
) -> Groups:
    """Make what the options need and no more. Collective over all ranks of the default group.

    Args:
        place: this rank.
        options: of all units of all clusters, alike on all ranks.
        backend: of torch.distributed.
        timeout_s: deadline of every routine.
        clusters: any place of each cluster that the job consists of, in one order on all ranks; None: it is one cluster.
    """
    own: dict[Key, ProcessGroup] = {}
    for lane, level in needed(options):
        for ranks in (ranks for cluster in clusters or (place,) for ranks in cluster.groups(level)):
            group = dist.new_group(ranks, timedelta(seconds=timeout_s), backend)  # every rank has to make every group
            if dist.get_rank() in ranks:
                own[lane, level] = group
    return Groups(place, own)
