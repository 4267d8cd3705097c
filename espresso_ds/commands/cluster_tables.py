"""A cluster profile for people: tables of hosts, links and of the backend beside MPI, then what is out of the ordinary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..core.hosts import people_gpus
from ..core.option import Level, Task
from ..core.people import people_bit_per_s, people_bytes, people_seconds
from ..core.profile import ClusterProfile, MpiCost

_SAME = {"allreduce": Task.ALLREDUCE, "allgather": Task.ALLGATHER, "alltoall": Task.ALLTOALL}
"""Operations of MPI and the routines of the backend that do the same."""


def tables(profile: ClusterProfile) -> RenderableType:
    """Everything worth a look, for rich's console; parts that an older file lacks are left out."""
    shown: list[RenderableType] = [_hosts(profile)] if profile.facts else []
    shown.append(_links(profile))
    if profile.mpi is not None:
        shown.append(_beside_mpi(profile))
    if profile.kind is not None:
        shown.append(Text(f"fingerprint of the cluster: {profile.kind.fingerprint}", style="dim"))
    return Group(*shown, *_remarks(profile))


def _hosts(profile: ClusterProfile) -> RenderableType:
    kind = profile.kind
    alike = kind is not None and len(kind.hosts) == 1
    table = _table(f"{profile.nodes} hosts x {profile.ranks_per_node} ranks over {profile.backend}")
    _columns(
        table, "host", *(() if alike else ("cores", "CPU", "GPUs")), "network cards", right=("sends", "receives", "computes")
    )
    fastest = max((speed.products_per_s for speed in profile.speeds), default=0.0)
    for place, host in enumerate(profile.facts):
        row = [host.name] if alike else [host.name, str(host.cores), host.cpu, people_gpus(host.gpus)]
        row.append(", ".join(f"{nic.name}{'*' if nic.carries else ''} {nic.label}" for nic in host.nics) or "-")
        if profile.speeds:
            speed = profile.speeds[place]
            row += [_rate(speed.up_bytes_per_s), _rate(speed.down_bytes_per_s), f"{speed.products_per_s / fastest:.0%}"]
        table.add_row(*row)
    host = profile.facts[0]
    made_of = f"each with {host.cores} cores ({host.cpu}), GPUs: {people_gpus(host.gpus)}\n" if alike else ""
    table.caption = f"{made_of}* carries the backend's traffic; computes: share of the fastest host's rate, all ranks at once"
    return table


def _links(profile: ClusterProfile) -> Table:
    table = _table("seconds = alpha + bytes / bandwidth")
    _columns(table, "what", right=("ranks", "alpha", "bandwidth", "fit", "spread"))
    for level, link in profile.links.items():
        line = _line(link.alpha_s, link.beta_s_per_byte, link.fit_error, link.spread)
        table.add_row(f"link {level}", "2", *line, style="bold")
    for cost in profile.routines:
        ranks = f"{cost.groups} x {cost.ranks}" if cost.groups > 1 else str(cost.ranks)
        line = _line(cost.alpha_s, cost.beta_s_per_byte, cost.fit_error, cost.spread)
        table.add_row(f"{cost.routine.name.lower()} {cost.level}", ranks, *line)
    table.caption = (
        "fit: median error of the line; spread: interquartile range over median, of the smallest and of the largest size;\n"
        "2 x 4: two groups of four ranks at once through every network card"
    )
    return table


def _line(alpha_s: float, beta: float, fit_error: float, spread: tuple[float, ...]) -> list[str]:
    ends = f"{spread[0]:.0%}, {spread[-1]:.0%}" if spread else "-"
    return [people_seconds(alpha_s), _rate(1 / beta if beta else None), f"{fit_error:.0%}", ends]


def _beside_mpi(profile: ClusterProfile) -> Table:
    assert profile.mpi is not None
    table = _table(f"{profile.backend} beside MPI ({profile.mpi.library})")
    _columns(table, "operation", right=("size", profile.backend, "MPI", f"{profile.backend} / MPI"))
    for cost in profile.mpi.costs:
        for nbytes, seconds in zip(cost.nbytes, cost.seconds, strict=True):
            here = _backend_s(profile, cost, nbytes)
            compared = (people_seconds(here), f"{here / seconds:.2f}") if here else ("-", "-")
            table.add_row(cost.operation, people_bytes(nbytes), compared[0], people_seconds(seconds), compared[1])
    table.caption = (
        f"over 1: {profile.backend} is the limit rather than the link; for people, the planner uses {profile.backend}'s"
    )
    return table


def _backend_s(profile: ClusterProfile, cost: MpiCost, nbytes: int) -> float | None:
    """Seconds of the backend's fitted line at MPI's size; None where it was not measured up to there."""
    link = profile.links.get(Level.INTER) or profile.links.get(Level.INTRA)
    flat = {each.routine: each for each in profile.routines if each.level is Level.FLAT}
    line = link if cost.operation == "send" else flat.get(_SAME[cost.operation])
    if line is None or not line.nbytes or nbytes > max(line.nbytes):
        return None
    return line.alpha_s + nbytes * line.beta_s_per_byte


def _remarks(profile: ClusterProfile) -> Iterator[RenderableType]:
    for remark in profile.remarks:
        yield Text(f"! {remark}", style="bold red" if remark.startswith("RESTLESS") else "bold yellow")
    if profile.facts and not profile.remarks:
        yield Text("All hosts and links are alike, within a factor of 1.5.", style="green")


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _columns(table: Table, *left: str, right: Sequence[str]) -> None:
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)


def _rate(bytes_per_s: float | None) -> str:
    return people_bit_per_s(8 * bytes_per_s) if bytes_per_s else "-"
