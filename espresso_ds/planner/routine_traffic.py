"""What a routine waits for and moves over nodes x GPUs: the alpha-beta models behind nominal and rescaled clusters.

A routine takes rounds * latency + nbytes * max(nic * beta_inter, gpu * beta_intra) seconds. `nbytes` is what one rank puts in
(see `RoutineCost`), `nic` the bytes through the busiest network card and `gpu` those through the busiest rank's link inside its
node, in the busier direction and per byte of `nbytes`; all links are full duplex. The beta of a `Link` is the seconds per byte
of one rank's link inside its node (intra) and of one node's card, which all its ranks share (inter). For a group of p = n m
ranks, m on each of n nodes, numbered node by node, of which k groups use the cards at once:

| routine | rounds   | nic (n > 1)   | gpu (m > 1) | algorithm behind the bytes                                           |
|---------|----------|---------------|-------------|----------------------------------------------------------------------|
| AR      | 2 log2 p | 2 k (p-1)/p   | 2 (p-1)/p   | reduce-scatter and allgather (Rabenseifner)                          |
| RS      | log2 p   | k (p-1)/p     | (p-1)/p     | ring: a node has one neighbour on either side                        |
| AG      | log2 p   | k (p-1)       | p-1         | ring, of whole payloads                                              |
| A2A     | log2 p   | k m (n-1)/n   | (m-1)/p     | pairwise exchange: each of the m ranks sends p-m of its p rows away  |
| RD      | log2 p   | k             | 1           | pipelined along the ranks: everything once into and out of each rank |
| BC      | log2 p   | k             | 1           | the same, the other way                                              |
| GA      | log2 p   | k (p-m)       | m-1         | every payload straight to the root, where it is the slowest          |

nic is 0 where n = 1, gpu where m = 1. Rounds are those of the logarithmic algorithms for short messages and bytes those of the
bandwidth-optimal ones for long messages, from Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication
Operations in MPICH", IJHPCA 19(1), 2005; theirs count one rank per node, and the two columns of bytes count the same algorithms'
messages over m ranks per node. Reduce and broadcast are counted as pipelined, at half of the 2 (p-1)/p of the paper's two phases,
which a full-duplex link can overlap. A group of one rank has one round, the call itself.

Gloo, and what the runtime sends itself over gloo (runtime/routines.py), go other ways; where they differ from the table:

| routine | rounds    | nic (n > 1)           | gpu (m > 1)         | algorithm                                                  |
|---------|-----------|-----------------------|---------------------|------------------------------------------------------------|
| AR      | 2 (p-1)   |                       |                     | a ring twice round, whatever the size                      |
| RS, A2A | p-1       | k m (n-1)/n * u       | (m-1)/p             | sends and receives, p-1 of each for every rank             |
| AG      | p-1       |                       |                     | a ring                                                     |
| RD      | 2 (p-1)   | k (p-1)/p + k (n-1)/n | (p-1)/p + (m-1)/p   | reduce-scatter round a ring, then a gather of the shards   |
| BC      | log2 p    | k m T(n)              | T(m)                | binomial tree of whole messages, all of a rank's at once   |
| GA      | 2 (p-1)/p |                       |                     | roots rotate and senders don't wait: a rank's mean         |

T(p) is the time until the tree's last rank has the message, if a rank sends to its c children in c times the time of one:
d (d+1) / 2 for p = 2^d. Its rounds are log2 p, rounded up. u is 1 for n = 2, where a card is busy as long as there is anything
to send, and UNEVEN for more nodes: all messages start at once, TCP gives them uneven shares, and at the end some cards wait for
others. `python -m benchmarks.sweep check` compares these models with measured clusters: docs/sweep.md.

Levels (E 4.2): flat is one group of all N g ranks (n = N, m = g); intra a group inside every node (n = 1, m = g); inter a group
of one rank of every node (n = N, m = 1), with k = g of them at once after a step that left every local rank a shard, and k = 1
after one that left the node's root everything. The roots of k simultaneous groups are taken to be on one node.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from ..core.option import Task


@dataclass(frozen=True)
class Layout:
    """Where the ranks of one group are."""

    nodes: int
    per_node: int
    groups: int = 1
    """How many such groups run at once and share each node's card."""

    @property
    def ranks(self) -> int:
        """Ranks of one group."""
        return self.nodes * self.per_node


class Traffic(NamedTuple):
    """Bytes through the busiest card and through the busiest rank's link inside its node, per byte that one rank puts in."""

    nic: float
    gpu: float


_NIC: dict[Task, Callable[[int, int], float]] = {
    Task.ALLREDUCE: lambda n, m: 2 * (n * m - 1) / (n * m),
    Task.REDUCE_SCATTER: lambda n, m: (n * m - 1) / (n * m),
    Task.ALLGATHER: lambda n, m: n * m - 1,
    Task.ALLTOALL: lambda n, m: m * (n - 1) / n,
    Task.REDUCE: lambda n, m: 1,
    Task.BROADCAST: lambda n, m: 1,
    Task.GATHER: lambda n, m: (n - 1) * m,
}
_GPU: dict[Task, Callable[[int, int], float]] = {
    **_NIC,  # a ring's or pipeline's hop inside a node carries what its hop between nodes carries
    Task.ALLTOALL: lambda n, m: (m - 1) / (n * m),
    Task.GATHER: lambda n, m: m - 1,
}


@cache
def _tree_messages(ranks: int) -> int:
    """T of the table: in step i of a binomial tree every rank below 2^i has the message and gives it to the one 2^i further."""
    reached = [0] * ranks
    for rank in range(ranks):
        children = [rank + (1 << bit) for bit in range(rank.bit_length(), ranks.bit_length()) if rank + (1 << bit) < ranks]
        for child in children:
            reached[child] = reached[rank] + len(children)
    return max(reached)


UNEVEN = 1.2
"""Measured: an alltoall of 4 and 16 MiB among 4 emulated hosts, over the time that its bytes need."""


def _exchanged(n: int, m: int) -> float:
    return _NIC[Task.ALLTOALL](n, m) * (UNEVEN if n > 2 else 1.0)


_GLOO_NIC: dict[Task, Callable[[int, int], float]] = {
    **_NIC,
    Task.REDUCE_SCATTER: _exchanged,
    Task.ALLTOALL: _exchanged,
    Task.REDUCE: lambda n, m: (n * m - 1) / (n * m) + (n - 1) / n,
    Task.BROADCAST: lambda n, m: m * _tree_messages(n),
}
_GLOO_GPU: dict[Task, Callable[[int, int], float]] = {
    **_GPU,
    Task.REDUCE_SCATTER: _GPU[Task.ALLTOALL],
    Task.REDUCE: lambda n, m: (n * m - 1 + m - 1) / (n * m),
    Task.BROADCAST: lambda n, m: _tree_messages(m),
}
_GLOO_ROUNDS: dict[Task, Callable[[int], float]] = {
    Task.ALLREDUCE: lambda p: 2 * (p - 1),
    Task.REDUCE_SCATTER: lambda p: p - 1,
    Task.ALLGATHER: lambda p: p - 1,
    Task.ALLTOALL: lambda p: p - 1,
    Task.REDUCE: lambda p: 2 * (p - 1),
    Task.BROADCAST: lambda p: math.ceil(math.log2(p)),
    Task.GATHER: lambda p: 2 * (p - 1) / p,
}


def rounds(task: Task, ranks: int, backend: str = "nccl") -> float:
    """Latencies that a routine of `ranks` ranks waits for, one after another."""
    if ranks > 1 and backend == "gloo":
        return _GLOO_ROUNDS[task](ranks)
    return max(1.0, math.log2(ranks)) * (2 if task is Task.ALLREDUCE else 1)


def traffic(task: Task, layout: Layout, backend: str = "nccl") -> Traffic:
    """What the busiest links carry; the tables above."""
    n, m = layout.nodes, layout.per_node
    nic, gpu = (_GLOO_NIC, _GLOO_GPU) if backend == "gloo" else (_NIC, _GPU)
    return Traffic(layout.groups * nic[task](n, m) if n > 1 else 0.0, gpu[task](n, m) if m > 1 else 0.0)
