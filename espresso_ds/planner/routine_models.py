"""Clusters from nominal figures, and measured ones with other nodes or links, by the models of `routine_traffic`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from ..core.errors import FileError
from ..core.option import ROUTINES, Level, Task
from ..core.profile import ClusterProfile, Link, RoutineCost
from .routine_traffic import Layout, Traffic, rounds, traffic

_SIZES = (1 << 10, 1 << 20, 1 << 30)
_LEAST_S = 1e-9  # profiles hold no zero times; less than a clock can tell


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
    bandwidth. Latency grows as the model's rounds, and on a single node by the ratio of the links' alphas; the rest as the
    model's bytes times the seconds per byte of the link that limits them. So routines keep what they were measured to lose
    against the model, and what is not changed stays as it is, to the bit. Which link limits a routine over both kinds is judged
    by the profile's point-to-point links. Assumed: latencies stay when bandwidths change, every node brings its own cores, the
    network has no bottleneck but the nodes' cards, the library goes on to use algorithms that scale like the tables', and
    `contention` and every `fit_error` stay as measured.

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
    waits = _latency_ratio(cost, cluster, before, after)
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


def _latency_ratio(cost: RoutineCost, cluster: ClusterProfile, before: Layout, after: Layout) -> float:
    """By which factor the latency of a routine grows. On a single node it no longer waits for the network."""
    ratio = rounds(cost.routine, after.ranks, cluster.backend) / rounds(cost.routine, before.ranks, cluster.backend)
    if before.nodes > 1 == after.nodes and len(cluster.links) > 1 and cluster.links[Level.INTER].alpha_s:
        ratio *= min(1.0, cluster.links[Level.INTRA].alpha_s / cluster.links[Level.INTER].alpha_s)
    return ratio


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
