"""The same links seen by MPI itself, beside the backend of training: whether the link, MPI or the backend is the limit.

Only where MPI started the ranks. Ranks inside an MPI call keep a core busy, so nothing else may run at the same time: all ranks
enter and leave together, and those that stand by sleep.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from ..core.profile import MpiCost, RawMpi
from .measure import Effort, Probe, Progress, measure
from .rendezvous import Ranks

_SIZES = (1 << 10, 1 << 16, 1 << 20, 1 << 23)
_MOST_GATHERED = 1 << 28
_EFFORT = Effort(grow_below_s=0.06, row_s=0.01, longest_row=20, budget_s=2.0, passes=(3, 5), again=1)
_POLL_S = 5e-4

Operation = Literal["allreduce", "allgather", "alltoall", "send"]
_OPERATIONS: tuple[Operation, ...] = ("allreduce", "allgather", "alltoall", "send")


def measure_raw_mpi(ranks: Ranks, progress: Progress) -> RawMpi | None:
    """A few sizes of MPI's allreduce (sums of float32), allgather, alltoall and of a message between two ranks; collective.

    None where the ranks were not started by MPI, or there is only one.

    Raises:
        RuntimeError: an operation failed (mpi4py's MPI.Exception is one). MPI has no deadlines: its launcher ends what hangs.
    """
    comm = ranks.comm
    if comm is None or comm.Get_size() != ranks.world_size or ranks.world_size == 1:
        return None
    from mpi4py import MPI

    def agree(seconds: Sequence[float]) -> list[float]:
        slowest = np.array(seconds)
        comm.Allreduce(MPI.IN_PLACE, slowest, op=MPI.MAX)
        return slowest.tolist()

    comm.Barrier()
    measured = measure([_probe(name, ranks) for name in _OPERATIONS], _EFFORT, agree, progress)
    costs = tuple(
        MpiCost(
            operation=name,
            nbytes=tuple(times),
            seconds=tuple(each.seconds for each in times.values()),
            spread=tuple(each.spread for each in times.values()),
        )
        for name, times in zip(_OPERATIONS, measured, strict=True)
    )
    comm.Barrier()
    return RawMpi(library=MPI.Get_library_version().strip("\0 \n").splitlines()[0].split(",")[0], costs=costs)


def _probe(name: Operation, ranks: Ranks) -> Probe:
    comm, world = ranks.comm, ranks.world_size
    row = 16 * world
    sizes = [-(-size // row) * row for size in _SIZES if name != "allgather" or world * size <= _MOST_GATHERED]
    given = np.zeros(sizes[-1], np.uint8)
    taken = np.zeros(sizes[-1] * (world if name == "allgather" else 1), np.uint8)
    pair = (0, ranks.ranks_per_node if len(ranks.hosts) > 1 else 1)
    once: dict[Operation, Callable[[int], object]] = {
        "allreduce": lambda n: comm.Allreduce(given[:n].view(np.float32), taken[:n].view(np.float32)),
        "allgather": lambda n: comm.Allgather(given[:n], taken[: n * world]),
        "alltoall": lambda n: comm.Alltoall(given[:n], taken[:n]),
        "send": lambda n: _send(comm, given[:n], ranks.rank, pair),
    }

    def run(nbytes: int, count: int) -> float:
        comm.Barrier()
        begin = time.perf_counter()
        for _ in range(count):
            once[name](nbytes)
        seconds = (time.perf_counter() - begin) / count
        _meet_asleep(comm)
        return seconds

    return Probe(f"MPI {name}", tuple(sizes), run)


def _send(comm: Any, message: np.ndarray, rank: int, pair: tuple[int, int]) -> None:
    """A message one way; the sender's time includes that the receiver has it (a synchronous send), the others' nothing."""
    if rank == pair[0]:
        comm.Ssend(message, pair[1])
    elif rank == pair[1]:
        comm.Recv(message, pair[0])


def _meet_asleep(comm: Any) -> None:
    """Wait for all ranks without keeping a core from those that still work."""
    met = comm.Ibarrier()
    while not met.Test():
        time.sleep(_POLL_S)
