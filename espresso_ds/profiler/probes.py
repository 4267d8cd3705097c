"""What is measured on a cluster: every routine of the options at every level, a link inside a node, a link between nodes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.option import Level, Task
from ..runtime import routines
from .measure import Probe
from .rendezvous import Ranks

_KIB, _MIB = 1 << 10, 1 << 20
_SMALLEST = 256
_LARGEST = {Task.ALLREDUCE: 64 * _MIB, Task.REDUCE_SCATTER: 64 * _MIB}
_LARGEST_OTHER = 16 * _MIB
_MOST_GATHERED = 256 * _MIB  # memory for all rows of an allgather or gather
_COARSE_BELOW = 64 * _KIB
_GROUP_WEIGHT = 1 / 3  # there are three times as many routines within levels as over all ranks
_ACK_NBYTES = 64  # the smallest message of a link, and the answer to every message


@dataclass(frozen=True)
class Scope:
    """The ranks between which routines run: groups of one level, all at once. As one rank sees it."""

    level: Level
    name: str
    group: torch.distributed.ProcessGroup
    size: int
    """Ranks of one group."""
    rank: int
    """This rank within its group."""
    groups: int
    """How many of the groups share a node's network card."""
    joins: bool = True
    """Whether this rank's group runs the routines; else it stands by."""


def scopes(ranks: Ranks) -> list[Scope]:
    """All ranks; then, where there are several nodes of several ranks, those of a node, and one of every node in two ways.

    Of the two kinds of groups between nodes, one has the groups of all local ranks at work, as after a reduce-scatter or alltoall
    inside the nodes, the other only that of the nodes' first ranks, as after a reduce or gather. The roots of groups at work
    together are on one node.
    """
    flat = Scope(Level.FLAT, "", ranks.group, ranks.world_size, ranks.rank, 1)
    if not ranks.levels:
        return [flat]
    local, nodes = ranks.ranks_per_node, len(ranks.hosts)
    node, inter = ranks.rank // local, ranks.levels[Level.INTER]
    return [
        flat,
        Scope(Level.INTRA, "inside nodes", ranks.levels[Level.INTRA], local, ranks.local_rank, 1),
        Scope(Level.INTER, "between nodes, all ranks", inter, nodes, node, local),
        Scope(Level.INTER, "between nodes, one rank each", inter, nodes, node, 1, joins=ranks.local_rank == 0),
    ]


class Buffers:
    """Memory of one rank, touched once and shared by all probes. Zeros stay zeros however often they are summed."""

    def __init__(self, ranks: Ranks) -> None:
        sizes = {(scope.size, task): scope_sizes(task, scope)[-1] for scope in scopes(ranks) for task in routines.ROUTINES}
        given = max(sizes.values())
        gathered = max(world * nbytes for (world, task), nbytes in sizes.items() if task in (Task.ALLGATHER, Task.GATHER))
        self.given = torch.empty(given, dtype=torch.uint8, device=ranks.device).zero_()
        self.taken = torch.empty(max(given, gathered), dtype=torch.uint8, device=ranks.device).zero_()


def routine_sizes(task: Task, world: int, coarse_below: int = 0) -> tuple[int, ...]:
    """Sizes in bytes of what one rank puts in, ascending and divisible into `world` aligned rows.

    The next is 4 times as large, or 16 times below `coarse_below` bytes.
    """
    largest = _LARGEST.get(task, _LARGEST_OTHER)
    if task in (Task.ALLGATHER, Task.GATHER):
        largest = min(largest, _MOST_GATHERED // world)
    row = 16 * world
    sizes, nbytes = set(), _SMALLEST
    while nbytes <= largest:
        sizes.add(-(-nbytes // row) * row)
        nbytes *= 16 if nbytes < coarse_below else 4
    return tuple(sorted(sizes))


def scope_sizes(task: Task, scope: Scope) -> tuple[int, ...]:
    """Sizes of a routine: between all ranks every one, in other groups fewer where latency rules, to save time."""
    return routine_sizes(task, scope.size, coarse_below=0 if scope.level is Level.FLAT else _COARSE_BELOW)


def routine_probe(task: Task, scope: Scope, ranks: Ranks, buffers: Buffers) -> Probe:
    """One routine in every group of a scope, as the runtime starts it and waits for it: sums of float32, rows of bytes.

    In a row, roots rotate, as they do from unit to unit in training. One root could run ahead of the others, and the mean would
    lack the latency.
    """
    start = _starter(task, scope, buffers)

    def run(nbytes: int, count: int) -> float:
        align(ranks)
        begin = time.perf_counter()
        for number in range(count if scope.joins else 0):
            start(nbytes, number % scope.size).wait(ranks.timeout_s)
        _settle(ranks)
        return (time.perf_counter() - begin) / count

    weight = 1.0 if scope.level is Level.FLAT else _GROUP_WEIGHT
    return Probe(f"{task.name.lower()} {scope.name}".strip(), scope_sizes(task, scope), run, weight)


def link_pairs(ranks: Ranks) -> dict[Level, tuple[int, int]]:
    """Two ranks of one node, and two of different nodes, as far as there are such."""
    pairs = {}
    if ranks.ranks_per_node > 1:
        pairs[Level.INTRA] = (0, 1)
    if len(ranks.hosts) > 1:
        pairs[Level.INTER] = (0, ranks.ranks_per_node)
    return pairs


def link_probe(level: Level, pair: tuple[int, int], ranks: Ranks, buffers: Buffers) -> Probe:
    """A message one way and a small answer back, timed by the sender; the other ranks stand by. See `one_way`."""
    sender, receiver = pair
    answer = torch.zeros(_ACK_NBYTES, dtype=torch.uint8, device=ranks.device)
    group = ranks.group

    def run(nbytes: int, count: int) -> float:
        align(ranks)
        begin = time.perf_counter()
        message = buffers.given[:nbytes]
        for _ in range(count if ranks.rank in pair else 0):
            if ranks.rank == sender:
                group.send([message], receiver, 0).wait()
                group.recv([answer], receiver, 0).wait()
            else:
                group.recv([message], sender, 0).wait()
                group.send([answer], sender, 0).wait()
        _settle(ranks)
        return (time.perf_counter() - begin) / count

    return Probe(f"{level} link", (_ACK_NBYTES, *(s for s in routine_sizes(Task.BROADCAST, 1) if s > _ACK_NBYTES)), run)


def one_way(round_trips: dict[int, float]) -> dict[int, float]:
    """Seconds of one message by size, from those of the message and the answer: half the smallest round trip is the answer's."""
    answer_s = round_trips[min(round_trips)] / 2
    # A larger message may by chance have taken no longer than the smallest one: it still took half of its own round trip.
    return {nbytes: max(seconds - answer_s, seconds / 2) for nbytes, seconds in round_trips.items()}


def largest(ranks: Ranks, seconds: list[float]) -> list[float]:
    """Element-wise maximum over all ranks; every rank gets the same bits."""
    x = torch.tensor(seconds, dtype=torch.float64, device=ranks.device)
    ranks.group.allreduce([x], torch.distributed.ReduceOp.MAX).wait()
    return x.tolist()


def _starter(task: Task, scope: Scope, buffers: Buffers) -> Callable[[int, int], routines.Started]:
    """The routine as a function of the bytes that one rank puts in and of the root."""
    group, world, here = scope.group, scope.size, scope.rank
    given, taken = buffers.given, buffers.taken

    def floats(buffer: Tensor, nbytes: int) -> Tensor:
        return buffer[:nbytes].view(torch.float32)

    return {
        Task.ALLREDUCE: lambda n, root: routines.allreduce(floats(given, n), group),
        Task.REDUCE: lambda n, root: routines.reduce(floats(given, n), root, group),
        Task.REDUCE_SCATTER: lambda n, root: routines.reduce_scatter(floats(taken, n // world), floats(given, n), group),
        Task.BROADCAST: lambda n, root: routines.broadcast(given[:n], root, group),
        Task.ALLGATHER: lambda n, root: routines.allgather(taken[: world * n], given[:n], group),
        Task.ALLTOALL: lambda n, root: routines.alltoall(taken[:n], given[:n], group),
        Task.GATHER: lambda n, root: routines.gather(taken[: world * n] if here == root else None, given[:n], root, group),
    }[task]


def align(ranks: Ranks) -> None:
    """Let all ranks start together. A tiny allreduce does it with every backend, and keeps no thread busy."""
    routines.allreduce(torch.zeros(1, device=ranks.device), ranks.group).wait(ranks.timeout_s)
    _settle(ranks)


def _settle(ranks: Ranks) -> None:
    """Routines on CUDA are over when the device is idle, not when their `wait` returns."""
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
