"""The ways in which ranks talk, alike to the eye of `bench_net`: torch.distributed's backends, and raw MPI through mpi4py.

Torch's routines are those that the runtime uses (`runtime.routines`). MPI's are the library's own on NumPy's views of the same
buffers, without torch and without gloo between the ranks at all, so they work where gloo does not.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import SyncError, UnsupportedError
from ..core.option import Level
from ..runtime import routines
from .bench_report import FAULT, P2P, Backend
from .mpi_world import communicator
from .rendezvous import joined, layout

Call = Callable[[Tensor, Tensor, int], object]
"""Runs a routine to its end: what this rank gives (and, in place, gets), what it takes, and the root's number in the team."""

Gather = Callable[[Sequence[float]], list[list[float]]]
"""Every rank's numbers, rank by rank, as many from each."""


@dataclass(frozen=True)
class Team:
    """The ranks between which a routine runs, as one of them sees it."""

    name: str
    level: Level
    size: int
    member: int
    """This rank's number in its team."""
    groups: int
    """How many such teams at work share a host's network card."""
    joins: bool
    """Whether this rank takes part; else it stands by."""
    calls: Mapping[str, Call]
    """The routines by name."""


@dataclass(frozen=True)
class World:
    """All ranks, host by host, and the teams among them."""

    backend: Backend
    library: str
    rank: int
    hosts: tuple[str, ...]
    ranks_per_node: int
    device: torch.device
    gather: Gather
    settle: Callable[[], None]
    """Wait until this rank's device is done."""
    teams: tuple[Team, ...]

    def align(self) -> None:
        """Let all ranks start together."""
        self.gather([0.0])
        self.settle()


@contextmanager
def world(backend: Backend | None, levels: Sequence[Level], timeout_s: float) -> Iterator[World]:
    """Join all ranks for the time of the `with` block.

    Args:
        backend: None for nccl where there is CUDA, else gloo.
        levels: which teams; all that there are if empty.
        timeout_s: deadline of every operation; raw MPI knows none.

    Raises:
        UnsupportedError, MismatchError, SyncError: as `rendezvous.joined`; alike on all ranks. There is one rank only; a level
            that one host, or one rank on each, does not have; raw MPI where mpirun did not start the ranks.
    """
    with _mpi_world(levels) if backend == "mpi" else _torch_world(backend, levels, timeout_s) as made:
        yield made


def torch_calls(group: torch.distributed.ProcessGroup, timeout_s: float) -> dict[str, Call]:
    """The routines of a group of torch's, by name; roots and members are numbered within it."""

    def wait(started: routines.Started) -> None:
        started.wait(timeout_s)

    def gather(given: Tensor, taken: Tensor, root: int) -> None:
        wait(routines.gather(taken if group.rank() == root else None, given, root, group))

    return {
        "allreduce": lambda given, taken, root: wait(routines.allreduce(given, group)),
        "reduce": lambda given, taken, root: wait(routines.reduce(given, root, group)),
        "broadcast": lambda given, taken, root: wait(routines.broadcast(given, root, group)),
        "reduce_scatter": lambda given, taken, root: wait(routines.reduce_scatter(taken, given, group)),
        "alltoall": lambda given, taken, root: wait(routines.alltoall(taken, given, group)),
        "allgather": lambda given, taken, root: wait(routines.allgather(taken, given, group)),
        "gather": gather,
    }


def torch_ping_pong(group: torch.distributed.ProcessGroup, pair: tuple[int, int]) -> dict[str, Call]:
    """A message from the first of the pair to the second and one back."""
    first, second = pair

    def call(given: Tensor, taken: Tensor, root: int) -> None:
        if group.rank() == first:
            group.send([given], second, 0).wait()
            group.recv([taken], second, 0).wait()
        else:
            group.recv([taken], first, 0).wait()
            group.send([given], first, 0).wait()

    return {P2P: call}


def torch_gather(group: torch.distributed.ProcessGroup, device: torch.device, timeout_s: float) -> Gather:
    """`World.gather` over a group of torch's."""

    def gather(numbers: Sequence[float]) -> list[list[float]]:
        own = torch.tensor(numbers, dtype=torch.float64, device=device)
        every = torch.empty(group.size() * len(own), dtype=torch.float64, device=device)
        routines.allgather(every, own, group).wait(timeout_s)
        return every.view(group.size(), -1).tolist()

    return gather


@contextmanager
def _torch_world(backend: Backend | None, levels: Sequence[Level], timeout_s: float) -> Iterator[World]:
    if backend == "nccl" and not torch.cuda.is_available():
        raise UnsupportedError("--backend nccl: torch finds no CUDA device here; use --backend gloo")
    with joined(backend, timeout_s) as ranks:
        flat = torch_calls(ranks.group, timeout_s)
        by_level = {level: torch_calls(group, timeout_s) for level, group in ranks.levels.items()}

        def settle() -> None:
            if ranks.device.type == "cuda":
                torch.cuda.synchronize(ranks.device)

        yield World(
            backend=backend or ("nccl" if ranks.backend == "nccl" else "gloo"),
            library=_torch_library(ranks.backend),
            rank=ranks.rank,
            hosts=ranks.hosts,
            ranks_per_node=ranks.ranks_per_node,
            device=ranks.device,
            gather=torch_gather(ranks.group, ranks.device, timeout_s),
            settle=settle,
            teams=teams(
                ranks.hosts,
                ranks.ranks_per_node,
                ranks.rank,
                levels,
                {Level.FLAT: flat, **by_level},
                lambda pair: torch_ping_pong(ranks.group, pair),
            ),
        )


@contextmanager
def _mpi_world(levels: Sequence[Level]) -> Iterator[World]:
    comm = communicator()
    from mpi4py import MPI

    try:
        hosts, per_node = layout(comm.allgather(socket.gethostname()))
        rank = comm.Get_rank()
        split = {
            Level.INTRA: lambda: comm.Split(rank // per_node, rank),
            Level.INTER: lambda: comm.Split(rank % per_node, rank),
        }
        by_level = {level: make() for level, make in split.items()} if len(hosts) > 1 and per_node > 1 else {}
        yield World(
            backend="mpi",
            library=MPI.Get_library_version().partition(",")[0].partition("\n")[0].strip(),
            rank=rank,
            hosts=hosts,
            ranks_per_node=per_node,
            device=torch.device("cpu"),
            gather=lambda numbers: comm.allgather(list(numbers)),
            settle=lambda: None,
            teams=teams(
                hosts,
                per_node,
                rank,
                levels,
                {level: _mpi_calls(each) for level, each in {Level.FLAT: comm, **by_level}.items()},
                lambda pair: _mpi_ping_pong(comm, pair),
            ),
        )
        for each in by_level.values():
            each.Free()
    except MPI.Exception as error:  # the other ranks may wait for this one, with no deadline
        print(f"{FAULT}MPI: {error}; ending all ranks", file=sys.stderr, flush=True)
        comm.Abort(1)
        raise SyncError(f"MPI: {error}") from error


def _mpi_calls(comm: Any) -> dict[str, Call]:
    from mpi4py import MPI

    def reduce(given: Tensor, taken: Tensor, root: int) -> None:
        own = given.numpy()
        comm.Reduce(*((MPI.IN_PLACE, own) if comm.Get_rank() == root else (own, None)), root=root)

    def gather(given: Tensor, taken: Tensor, root: int) -> None:
        comm.Gather(given.numpy(), taken.numpy() if comm.Get_rank() == root else None, root)

    return {
        "allreduce": lambda given, taken, root: comm.Allreduce(MPI.IN_PLACE, given.numpy()),
        "reduce": reduce,
        "broadcast": lambda given, taken, root: comm.Bcast(given.numpy(), root),
        "reduce_scatter": lambda given, taken, root: comm.Reduce_scatter_block(given.numpy(), taken.numpy()),
        "alltoall": lambda given, taken, root: comm.Alltoall(given.numpy(), taken.numpy()),
        "allgather": lambda given, taken, root: comm.Allgather(given.numpy(), taken.numpy()),
        "gather": gather,
    }


def _mpi_ping_pong(comm: Any, pair: tuple[int, int]) -> dict[str, Call]:
    first, second = pair

    def call(given: Tensor, taken: Tensor, root: int) -> None:
        if comm.Get_rank() == first:
            comm.Send(given.numpy(), second)
            comm.Recv(taken.numpy(), second)
        else:
            comm.Recv(taken.numpy(), first)
            comm.Send(given.numpy(), first)

    return {P2P: call}


def teams(
    hosts: Sequence[str],
    per_node: int,
    rank: int,
    levels: Sequence[Level],
    calls: Mapping[Level, Mapping[str, Call]],
    ping_pong: Callable[[tuple[int, int]], Mapping[str, Call]],
) -> tuple[Team, ...]:
    """The pairs of ranks that measure the links, then the teams of every level wanted.

    Between hosts there are two kinds: one rank of each host, and all of them at once, which share the hosts' network cards.

    Args:
        hosts: in the order of their ranks.
        per_node: ranks on each.
        rank: this one.
        levels: all that there are if empty.
        calls: the routines of the groups that this rank is in; flat always, the others where there are several hosts of several
            ranks.
        ping_pong: the routine of two of all ranks.

    Raises:
        UnsupportedError: alike on all ranks: one rank only, or a level that does not exist.
    """
    nodes, local, size = len(hosts), rank % per_node, len(hosts) * per_node
    if size == 1:
        raise UnsupportedError("one rank has nobody to talk to; start at least two (--ranks 2, mpirun -n 2)")
    for level in levels:
        if level is not Level.FLAT and level not in calls:
            one = "all ranks are on one host" if nodes == 1 else "every host has one rank"
            raise UnsupportedError(f"--level {level}: {one}, so there are no groups but that of all ranks; use --level flat")
    pairs = {Level.INTRA: (0, 1)} if per_node > 1 else {}
    pairs |= {Level.INTER: (0, per_node)} if nodes > 1 else {}
    names = {Level.INTRA: "inside a host", Level.INTER: "between hosts"}
    found = [
        Team(f"rank {a} to {b}, {names[level]}", level, 2, int(rank == b), 1, rank in (a, b), ping_pong((a, b)))
        for level, (a, b) in pairs.items()
    ]
    wanted = levels or tuple(calls)
    if Level.FLAT in wanted:
        found.append(Team("all ranks", Level.FLAT, size, rank, 1, True, calls[Level.FLAT]))
    if Level.INTRA in wanted:
        found.append(Team("inside hosts", Level.INTRA, per_node, local, 1, True, calls[Level.INTRA]))
    if Level.INTER in wanted:
        inter, node = calls[Level.INTER], rank // per_node
        found.append(Team("between hosts, one rank each", Level.INTER, nodes, node, 1, local == 0, inter))
        found.append(Team("between hosts, all ranks", Level.INTER, nodes, node, per_node, True, inter))
    return tuple(found)


def _torch_library(backend: str) -> str:
    version = ".".join(map(str, torch.cuda.nccl.version())) if backend == "nccl" else f"of torch {torch.__version__}"
    return f"{backend} {version}"
