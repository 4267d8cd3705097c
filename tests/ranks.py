"""Ranks as threads of one process, each with real gloo groups over an in-memory store."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch.distributed as dist

DEADLINE_S = 30.0


class Ranks:
    """`world` ranks as threads; `groups[lane][rank]` is that rank's gloo group for the lane."""

    def __init__(self, world: int, lanes: int = 1):
        self.world = world
        self.threads = ThreadPoolExecutor(world)
        store = dist.HashStore()

        def join(rank, lane):
            return dist.ProcessGroupGloo(dist.PrefixStore(str(lane), store), rank, world, timedelta(seconds=DEADLINE_S))

        self.groups = [list(self.threads.map(join, range(world), [lane] * world)) for lane in range(lanes)]

    def run(self, work):
        """Results of `work(rank, group of lane 0)` of all ranks at once; an error of any rank is raised."""
        return list(self.threads.map(work, range(self.world), self.groups[0], timeout=2 * DEADLINE_S))

    def run_lanes(self, work):
        """Results of `work(rank, groups by lane)` of all ranks at once; an error of any rank is raised."""
        return list(self.threads.map(work, range(self.world), zip(*self.groups, strict=True), timeout=2 * DEADLINE_S))

    def close(self):
        self.threads.shutdown()
        for lane in self.groups:
            for group in lane:
                group.shutdown()
        self.groups.clear()
