"""Ranks as threads of one process, each with real gloo groups over an in-memory store."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch.distributed as dist

from espresso_ds.runtime.groups import Groups, needed
from espresso_ds.runtime.paths import Place

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

    def close(self):
        self.threads.shutdown()
        for lane in self.groups:
            for group in lane:
                group.shutdown()
        self.groups.clear()


class Cluster:
    """The ranks of `nodes` hosts as threads, with the groups that `options` need."""

    def __init__(self, nodes: int, ranks_per_node: int, options):
        self.places = [Place(nodes, ranks_per_node, rank) for rank in range(nodes * ranks_per_node)]
        self.threads = ThreadPoolExecutor(len(self.places))
        store, keys = dist.HashStore(), needed(options)

        def join(place: Place) -> Groups:
            made = {}
            for lane, level in keys:
                ranks = next(ranks for ranks in place.groups(level) if place.rank in ranks)
                prefix = dist.PrefixStore(f"{lane}/{level}/{ranks[0]}", store)
                made[lane, level] = dist.ProcessGroupGloo(
                    prefix, ranks.index(place.rank), len(ranks), timedelta(seconds=DEADLINE_S)
                )
            return Groups(place, made)

        self.groups = list(self.threads.map(join, self.places, timeout=2 * DEADLINE_S))

    def run(self, work):
        """Results of `work(groups)` of all ranks at once, rank by rank; an error of any rank is raised."""
        return list(self.threads.map(work, self.groups, timeout=4 * DEADLINE_S))

    def close(self):
        self.threads.shutdown()
        for groups in self.groups:
            for group in groups.by_lane.values():
                group.shutdown()
        self.groups.clear()
