"""Alpha-beta models of the routines over nodes x GPUs: clusters from nominal figures, measured ones with other nodes or links.

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
which a full-duplex link can overlap. A group of one rank has one round, the call itself. Over gloo the runtime sends a
reduce-scatter as an alltoall, and its bytes are those of A2A.

Levels (E 4.2): flat is one group of all N g ranks (n = N, m = g); intra a group inside every node (n = 1, m = g); inter a group
of one rank of every node (n = N, m = 1), with k = g of them at once after a step that left every local rank a shard, and k = 1
after one that left the node's root everything. The roots of k simultaneous groups are taken to be on one node.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..core.errors import FileError
from ..core.option import ROUTINES, Level, Task
from ..core.profile import ClusterProfile, Link, RoutineCost

_SIZES = (1 << 10, 1 << 20, 1 << 30)
_LEAST_S = 1e-9  # profiles hold no zero times; less than a clock can tell


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


def rounds(task: Task, ranks: int) -> float:
    """Latencies that a routine of `ranks` ranks waits for, one after another."""
    return max(1.0, math.log2(ranks)) * (2 if task is Task.ALLREDUCE else 1)


def traffic(task: Task, layout: Layout, backend: str = "nccl") -> Traffic:
    """What the busiest links carry; the table above."""
    if task is Task.REDUCE_SCATTER and backend == "gloo":
        task = Task.ALLTOALL
    n, m = layout.nodes, layout.per_node
    return Traffic(layout.groups * _NIC[task](n, m) if n > 1 else 0.0, _GPU[task](n, m) if m > 1 else 0.0)


def layouts(nodes: int, ranks_per_node: int) -> list[tuple[Level, Layout]]:
    """What a profile of such a cluster holds: flat, and with several nodes of several ranks also intra and inter, two ways."""
    flat = (Level.FLAT, Layout(nodes, ranks_per_node))
    if nodes == 1 or ranks_per_node == 1:
        return [flat]
    inside = (Level.INTRA, Layout(1, ranks_per_node))
    return [flat, inside, *((Level.INTER, Layout(nodes, 1, groups)) for groups in (ranks_per_node, 1))]


def nominal_cluster(nodes: int, gpus_per_node: int, intra: Link, inter: Link, backend: str = "nccl") -> ClusterProfile:
    """A profile from data-sheet figures, exactly on the model's lines.

    Args:
        nodes: number of nodes.
        gpus_per_node: ranks of each.
        intra: alpha_s is what a routine inside a node waits for in all, in seconds, whatever the routine;
            beta_s_per_byte that of one GPU's link.
        inter: the same of routines between nodes, flat ones included, and of one node's network card.
        backend: whose figures these are.

    Raises:
        FileError: there is no node or no GPU.
    """
    _check_positive(nodes=nodes, gpus_per_node=gpus_per_node)
    links = _present({Level.INTRA: intra, Level.INTER: inter}, nodes, gpus_per_node)
    return ClusterProfile(
        backend=backend,
        hosts=_hosts((), nodes),
        ranks_per_node=gpus_per_node,
        links=links,
        routines=tuple(
            _nominal_cost(task, level, layout, intra, inter, backend)
            for level, layout in layouts(nodes, gpus_per_node)
            for task in sorted(ROUTINES)
        ),
    )


def rescaled(
    cluster: ClusterProfile,
    *,
    nodes: int | None = None,
    ranks_per_node: int | None = None,
    inter_speed: float = 1.0,
    intra_speed: float = 1.0,
) -> ClusterProfile:
    """The profile that the cluster would have with more or fewer nodes or ranks per node, or with links of other bandwidth.

    Every measured time is cut into its latency, the fitted alpha (or all of it, where it took less), and the rest, which is
    bandwidth. Latency grows as the model's rounds, the rest as the model's bytes times the seconds per byte of the link that
    limits them. So routines keep what they were measured to lose against the model, and what is not changed stays as it is, to
    the bit. Which link limits a routine over both kinds is judged by the profile's point-to-point links. Assumed: latencies
    stay when bandwidths change, the network has no bottleneck but the nodes' cards, the library goes on to use algorithms that
    scale like the table's, and `contention` and every `fit_error` stay as measured.

    Args:
        cluster: as measured.
        nodes: number of nodes (default: as measured).
        ranks_per_node: (default: as measured).
        inter_speed: bandwidth of the nodes' network cards over the measured one.
        intra_speed: bandwidth of the links inside nodes over the measured one.

    Returns:
        Flat routines, and those of intra and inter that were measured and still have several ranks.

    Raises:
        FileError: an argument is not positive, or a link that would matter was not measured.
    """
    nodes = cluster.nodes if nodes is None else nodes
    local = cluster.ranks_per_node if ranks_per_node is None else ranks_per_node
    _check_positive(nodes=nodes, ranks_per_node=local, inter_speed=inter_speed, intra_speed=intra_speed)
    speeds = Speeds(inter_speed, intra_speed)
    kept = {level for level, _ in layouts(nodes, local)}
    return cluster.model_copy(
        update={
            "hosts": _hosts(cluster.hosts, nodes),
            "ranks_per_node": local,
            "links": {
                level: link.model_copy(update={"beta_s_per_byte": link.beta_s_per_byte / speeds.of(level)})
                for level, link in _present(cluster.links, nodes, local).items()
            },
            "routines": tuple(
                _rescaled_cost(cost, cluster, nodes, local, speeds) for cost in cluster.routines if cost.level in kept
            ),
        }
    )


class Speeds(NamedTuple):
    """Bandwidths of links over the measured ones."""

    inter: float
    intra: float

    def of(self, level: Level) -> float:
        """The factor of the links of `level`."""
        return self.inter if level is Level.INTER else self.intra


def _nominal_cost(task: Task, level: Level, layout: Layout, intra: Link, inter: Link, backend: str) -> RoutineCost:
    alpha_s = (inter if layout.nodes > 1 else intra).alpha_s
    beta = _limit(traffic(task, layout, backend), inter.beta_s_per_byte, intra.beta_s_per_byte)
    return RoutineCost(
        routine=task,
        level=level,
        ranks=layout.ranks,
        groups=layout.groups,
        nbytes=_SIZES,
        seconds=tuple(max(_LEAST_S, alpha_s + beta * nbytes) for nbytes in _SIZES),
        alpha_s=alpha_s,
        beta_s_per_byte=beta,
        fit_error=0.0,
    )


def _rescaled_cost(cost: RoutineCost, cluster: ClusterProfile, nodes: int, local: int, speeds: Speeds) -> RoutineCost:
    before = _layout(cost.level, cluster.nodes, cluster.ranks_per_node, cost.groups)
    groups = local if cost.groups == cluster.ranks_per_node and cost.groups > 1 else cost.groups
    after = _layout(cost.level, nodes, local, groups)
    waits = rounds(cost.routine, after.ranks) / rounds(cost.routine, before.ranks)
    flow = _flow_ratio(cost, cluster, before, after, speeds)
    return cost.model_copy(
        update={
            "ranks": after.ranks,
            "groups": after.groups,
            # bandwidth (s - latency) * flow plus latency * waits, in the form that leaves s as it is where both factors are 1
            "seconds": tuple(max(_LEAST_S, s * flow + min(s, cost.alpha_s) * (waits - flow)) for s in cost.seconds),
            "alpha_s": cost.alpha_s * waits,
            "beta_s_per_byte": cost.beta_s_per_byte * flow,
        }
    )


def _layout(level: Level, nodes: int, local: int, groups: int) -> Layout:
    return Layout(1 if level is Level.INTRA else nodes, 1 if level is Level.INTER else local, groups)


def _flow_ratio(cost: RoutineCost, cluster: ClusterProfile, before: Layout, after: Layout, speeds: Speeds) -> float:
    """By which factor the bandwidth part of a routine grows. A link's beta matters only where the routine uses both links."""
    links = cluster.links
    old, new = (traffic(cost.routine, layout, cluster.backend) for layout in (before, after))
    if old == new and speeds == Speeds(1.0, 1.0):
        return 1.0
    if not any(new):
        return 0.0
    needed = [level for level, uses in ((Level.INTER, old.nic or new.nic), (Level.INTRA, old.gpu or new.gpu)) if uses]
    if len(needed) == 1 and any(old):
        return (new.nic / old.nic if needed == [Level.INTER] else new.gpu / old.gpu) / speeds.of(needed[0])
    if missing := next((level for level in needed if level not in links), None):
        raise FileError(
            f"cluster profile: {cost.routine}.{cost.level} of {before.ranks} ranks says nothing about {after.ranks} ranks on "
            f"{after.nodes} nodes, since no {missing} link was measured; profile two nodes or more, with as many ranks on each "
            f"as in training: `{ClusterProfile.MADE_BY}`"
        )
    betas = {level: links[level].beta_s_per_byte if level in links else 0.0 for level in Level}
    was = _limit(old, betas[Level.INTER], betas[Level.INTRA])
    if not was:
        raise FileError(
            f"cluster profile: {cost.routine}.{cost.level} of {before.ranks} ranks moved nothing through a link with a "
            f"measurable time per byte, so nothing follows for {after.ranks} ranks; measure again with `{ClusterProfile.MADE_BY}`"
        )
    return _limit(new, betas[Level.INTER] / speeds.inter, betas[Level.INTRA] / speeds.intra) / was


def _limit(per_byte: Traffic, inter_beta: float, intra_beta: float) -> float:
    return max(per_byte.nic * inter_beta, per_byte.gpu * intra_beta)


def _present(links: Mapping[Level, Link], nodes: int, local: int) -> dict[Level, Link]:
    there = {Level.INTRA: local > 1, Level.INTER: nodes > 1}
    return {level: link for level, link in links.items() if there.get(level)}


def _hosts(measured: tuple[str, ...], nodes: int) -> tuple[str, ...]:
    return measured[:nodes] + tuple(f"node{number}" for number in range(len(measured), nodes))


def _check_positive(**given: float) -> None:
    for name, value in given.items():
        if not (value > 0 and math.isfinite(value)):
            raise FileError(f"{name} is {value!r}; give a positive number")
