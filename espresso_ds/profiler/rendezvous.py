"""Find the other ranks, started by mpirun, srun or a launcher with torchrun's variables, and join them in one torch group.

Under mpirun, rank 0 opens a store on a free port and MPI tells the others where. Which of rank 0's addresses to use is not
guessed: each rank tries them all, and the first that every rank reached is taken.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist

from ..core.errors import MismatchError, SyncError, UnsupportedError
from ..core.host_facts import this_host
from ..core.hosts import Host
from ..core.option import Level
from .mpi_world import Place, communicator, place_without_mpi

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_CONNECT_S = 3.0


@dataclass(frozen=True)
class Ranks:
    """The group of all ranks and where they run. Ranks are numbered host by host."""

    group: dist.ProcessGroup
    rank: int
    backend: str
    device: torch.device
    hosts: tuple[str, ...]
    ranks_per_node: int
    timeout_s: float
    levels: Mapping[Level, dist.ProcessGroup] = field(default_factory=dict)
    """This rank's groups inside its node and across the nodes; empty where `members` is."""
    facts: tuple[Host, ...] = ()
    """One for each of `hosts`, as the first of its ranks tells."""
    comm: Any = None
    """mpi4py's COMM_WORLD with the same ranks, where MPI started them."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.hosts) * self.ranks_per_node

    @property
    def local_rank(self) -> int:
        """Number of this rank among those of its node."""
        return self.rank % self.ranks_per_node

    def members(self) -> dict[Level, list[int]]:
        """Ranks of this rank's group of either level: those of its node, and those with its local rank on every node.

        Empty where there is one node, or one rank on each: every group would then be all ranks, or a single one.
        """
        if len(self.hosts) == 1 or self.ranks_per_node == 1:
            return {}
        first = self.rank - self.local_rank
        return {
            Level.INTRA: list(range(first, first + self.ranks_per_node)),
            Level.INTER: list(range(self.local_rank, self.world_size, self.ranks_per_node)),
        }


@contextmanager
def joined(backend: str | None, timeout_s: float) -> Iterator[Ranks]:
    """Join all ranks for the time of the `with` block; the group is destroyed at its end.

    Args:
        backend: None for nccl where there is CUDA, else gloo.
        timeout_s: deadline of every operation.

    Raises:
        UnsupportedError: alike on all ranks: no address of rank 0 is reachable, hosts have uneven numbers of ranks or ranks that
            are not numbered host by host, or gloo would use loopback between hosts.
        MismatchError: alike on all ranks: they chose different backends.
        SyncError: a rank did not come in time.
    """
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    timeout = timedelta(seconds=timeout_s)
    try:
        addressed = all(map(os.environ.get, _ENVIRONMENT))
        place = None if addressed else place_without_mpi()
        comm = None if addressed or place else communicator()
        store, rank, world = _from_environment(place, timeout) if comm is None else _from_mpi(comm, timeout)
        facts = this_host(_processor(), backend).model_dump(mode="json")
        told = _exchange(store, rank, world, {"host": _processor(), "backend": backend, "fault": _gloo_fault(), "facts": facts})
        _leave(store, rank, world, "exchange")  # each rank may now raise what it finds
        hosts, per_node = _check(told)
        device = torch.device("cpu")
        if backend == "nccl":
            device = torch.device("cuda", rank % per_node)
            torch.cuda.set_device(device)
        dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=world, timeout=timeout)
    except RuntimeError as error:  # torch's and MPI's one kind for everything that may go wrong between ranks
        raise SyncError(f"ranks did not meet within {timeout_s:g} s: {error}") from error
    try:
        group = dist.group.WORLD
        assert group is not None
        made_of = tuple(Host.read({**each["facts"], "slots": per_node}, each["host"]) for each in told[::per_node])
        ranks = Ranks(group, rank, backend, device, hosts, per_node, timeout_s, facts=made_of, comm=comm)
        yield replace(ranks, levels=_level_groups(ranks, timeout))
        _leave(store, rank, world, "group")
    finally:
        dist.destroy_process_group()


def _level_groups(ranks: Ranks, timeout: timedelta) -> dict[Level, dist.ProcessGroup]:
    """The groups of `Ranks.levels`, with the backend of all. Only the members of a group meet for it. Raises SyncError."""
    try:
        return {
            level: dist.new_group(members, timeout, ranks.backend, use_local_synchronization=True)
            for level, members in ranks.members().items()
        }
    except RuntimeError as error:  # as above
        raise SyncError(f"ranks of a node, or of one of every node, did not meet: {error}") from error


def layout(names: Sequence[str]) -> tuple[tuple[str, ...], int]:
    """Hosts in the order of their ranks, and ranks per host, from every rank's host name.

    Raises:
        UnsupportedError: hosts have different numbers of ranks, or ranks are not numbered host by host.
    """
    hosts = tuple(dict.fromkeys(names))
    counts = {host: names.count(host) for host in hosts}
    per_node = counts[hosts[0]]
    if len(set(counts.values())) > 1:
        raise UnsupportedError(f"hosts have uneven numbers of ranks ({_listed(counts)}); give all the same slots")
    if list(names) != [host for host in hosts for _ in range(per_node)]:
        raise UnsupportedError(
            f"ranks alternate between hosts ({', '.join(names)}); number them host by host (mpirun --map-by slot)"
        )
    return hosts, per_node


def _check(told: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], int]:
    """What all ranks told, checked by each of them alike."""
    hosts, per_node = layout([each["host"] for each in told])
    for rank, each in enumerate(told):
        if len(hosts) > 1 and each["backend"] == "gloo" and each["fault"]:
            raise UnsupportedError(f"rank {rank} on {each['host']}: {each['fault']}")
        if each["backend"] != told[0]["backend"]:
            raise MismatchError(
                f"rank 0 on {told[0]['host']} would use {told[0]['backend']}, "
                f"rank {rank} on {each['host']} {each['backend']}; choose with --backend"
            )
    return hosts, per_node


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{host}: {count}" for host, count in counts.items())


def _exchange(store: dist.Store, rank: int, world: int, value: object) -> list:
    """Every rank's value, through the store: it works before there is a group, whatever the backend."""
    store.set(f"espresso/{rank}", json.dumps(value))
    return [json.loads(store.get(f"espresso/{other}")) for other in range(world)]


def _leave(store: dist.Store, rank: int, world: int, what: str) -> None:
    """Keep rank 0, whose end is the end of the store, until every rank is through with `what`."""
    if store.add(f"espresso/{what}/left", 1) == world:
        store.set(f"espresso/{what}/all_left", "")
    if rank == 0:
        store.get(f"espresso/{what}/all_left")


def _from_environment(place: Place | None, timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Meet at the address of torchrun's variables, or at `place`."""
    found = (
        dist.rendezvous("env://", timeout=timeout)
        if place is None
        else dist.rendezvous(f"tcp://{place.host}:{place.port}", place.rank, place.size, timeout=timeout)
    )
    store, rank, world = next(found)
    return dist.PrefixStore("espresso-profile", store), rank, world


def _from_mpi(comm: Any, timeout: timedelta) -> tuple[dist.Store, int, int]:
    rank, world = comm.Get_rank(), comm.Get_size()
    store = dist.TCPStore("127.0.0.1", 0, None, True, timeout, wait_for_workers=False) if rank == 0 else None
    port, addresses = comm.bcast((store.port, _addresses()) if store is not None else None)
    reached = comm.allgather([address for address in addresses if _reachable(address, port)])
    common = [address for address in addresses if all(address in each for each in reached)]
    if not common:
        cut_off = [host for host, each in zip(comm.allgather(_processor()), reached, strict=True) if not each]
        raise UnsupportedError(
            f"no address of rank 0 ({', '.join(addresses)}) is reachable on port {port} from every rank "
            f"(no address at all from: {', '.join(dict.fromkeys(cut_off)) or 'no single host'}); "
            "name the network interface in GLOO_SOCKET_IFNAME, or rank 0's address in MASTER_ADDR, and open its ports"
        )
    return store or dist.TCPStore(common[0], port, None, False, timeout), rank, world


def _processor() -> str:
    return socket.gethostname()  # what MPI_Get_processor_name gives too, and torchrun's ranks have no MPI


def _addresses() -> list[str]:
    """Where others may reach this host, best first: what the user names, its name, its interfaces; loopback for one host."""
    chosen = os.environ.get("MASTER_ADDR")
    wanted = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    found = {name: [a.address for a in every if a.family == socket.AF_INET] for name, every in psutil.net_if_addrs().items()}
    if chosen:
        return [chosen]
    if wanted:
        return [address for name in wanted for address in found.get(name, [])] or [f"{wanted[0]} (no IPv4 address)"]
    local = [address for every in found.values() for address in every]
    return [_processor(), *sorted(local, key=lambda address: address.startswith("127."))]


def _reachable(address: str, port: int) -> bool:
    """Whether rank 0's store answers at this address. Loopback does so on rank 0's own host, or not at all."""
    try:
        socket.create_connection((address, port), _CONNECT_S).close()
    except OSError:
        return False
    return True


def _gloo_fault() -> str:
    """Gloo listens on the address of the host name: loopback, as some systems write it into /etc/hosts, cuts the host off."""
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return ""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = "no address"
    if address == "no address" or address.startswith("127."):
        return (
            f"the host name {name} resolves to {address}, where gloo cannot be reached; name the interface in GLOO_SOCKET_IFNAME"
        )
    return ""
