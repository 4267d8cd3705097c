"""Who started this process as one rank of many: from the variables that launchers set, checked against what MPI itself says.

An MPI library finds its ranks only under its own launcher. Under another one each rank quietly gets a world of its own, of one
rank, or aborts; which library mpi4py takes is decided on each host. So the two are compared before MPI starts.
"""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.errors import UnsupportedError

OPENMPI, HYDRA, TORCHRUN, SRUN = "Open MPI's mpirun", "Hydra's mpiexec (MPICH, Intel MPI)", "torchrun", "srun"
_VARIABLES = (
    (TORCHRUN, "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    (OPENMPI, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    (HYDRA, "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    (SRUN, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
_FIRST_SPECIAL_STEP = 0xFFFFFFF0  # batch scripts, interactive shells and prologs are steps too, with numbers from here on
_MASTER_PORT = 29500  # torch's own default


@dataclass(frozen=True)
class Launched:
    """This process among those that a launcher started.

    Attributes:
        by: what started it, for people.
        rank: 0 to size - 1.
        size: number of ranks.
        local_rank: number among the ranks of this host; None where the launcher does not say.
    """

    by: str
    rank: int
    size: int
    local_rank: int | None


@dataclass(frozen=True)
class Place:
    """Where rank 0 opens a store and the others find it, without MPI."""

    host: str
    port: int
    rank: int
    size: int


def launched(env: Mapping[str, str] = os.environ) -> Launched | None:
    """What started this process as a rank, the innermost where launchers are nested; None if none did.

    torchrun counts with its address alone (MASTER_ADDR, MASTER_PORT), and srun in steps that it started itself: batch scripts
    and interactive shells have its variables too. Open MPI and Hydra start their daemons by srun in an allocation, so that their
    ranks have both kinds of variables; srun's are believed where Hydra's (or Slurm's own PMI-2, which sets the same) agree.

    Raises:
        UnsupportedError: a variable holds no number.
    """
    found = {by: each for by, *names in _VARIABLES if (each := _read(by, names, env)) is not None}
    if TORCHRUN in found and not (env.get("MASTER_ADDR") and env.get("MASTER_PORT")):
        del found[TORCHRUN]
    if SRUN in found and _number(env, "SLURM_STEP_ID", _FIRST_SPECIAL_STEP) >= _FIRST_SPECIAL_STEP:
        del found[SRUN]
    step, hydra = found.get(SRUN), found.get(HYDRA)
    if step is not None and hydra is not None and (step.rank, step.size) == (hydra.rank, hydra.size):
        del found[HYDRA]
    return next(iter(found.values()), None)


def place_without_mpi(env: Mapping[str, str] = os.environ) -> Place | None:
    """Where ranks meet that need no MPI, or None where MPI is to bring them together.

    Under srun it is never needed: Slurm says all there is to know, and its own PMI is off by default on many clusters. Under
    other launchers MASTER_ADDR takes its place where mpi4py is not installed.

    Raises:
        UnsupportedError: a variable holds no number.
    """
    found = launched(env)
    if found is None or (found.by != SRUN and not (env.get("MASTER_ADDR") and _mpi4py_missing())):
        return None
    return meeting_place(found, env)


def meeting_place(found: Launched, env: Mapping[str, str] = os.environ) -> Place:
    """Rank 0's address: MASTER_ADDR and MASTER_PORT where they are given, else what Slurm's list of hosts says.

    Raises:
        UnsupportedError: neither is there, or a variable holds no number.
    """
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "") if found.by == SRUN else ""
    host = env.get("MASTER_ADDR") or first_host(nodes)
    if not host:
        raise UnsupportedError(
            f"{found.by} started rank {found.rank} of {found.size} and nothing says where rank 0 is; "
            "export MASTER_ADDR=<name of the first host>"
        )
    port = _MASTER_PORT
    if found.by == SRUN:  # jobs may share a host, and a job's steps may follow each other fast
        port = 20000 + (7 * _number(env, "SLURM_JOB_ID", 0) + _number(env, "SLURM_STEP_ID", 0)) % 10000
    return Place(host, _number(env, "MASTER_PORT", port), found.rank, found.size)


def first_host(nodes: str) -> str:
    """The first host of a Slurm list such as `gpu[07-09,12],login1`, which has rank 0; empty for an empty list."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else "")


def communicator() -> Any:
    """MPI's world (`mpi4py.MPI.COMM_WORLD`), once launcher and library are known to belong together. Starts MPI if need be.

    Raises:
        UnsupportedError: mpi4py or an MPI library is missing, or the library is not the launcher's; says how to mend it.
    """
    try:
        import mpi4py

        mpi4py.rc.initialize = False  # the wrong library would abort the process instead of raising
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there and finds no MPI library
        raise UnsupportedError(
            f"no MPI here ({error}); install it with `pip install espresso-ds[mpi]` or as a system package, "
            "or export MASTER_ADDR=<name of the first host>, or start by torchrun or srun"
        ) from error
    found, library = launched(), _first_line(MPI.Get_library_version())
    if found is not None:
        check_library(found, library)
    if not MPI.Is_initialized():
        MPI.Init_thread()
        atexit.register(MPI.Finalize)
    comm = MPI.COMM_WORLD
    if found is not None and comm.Get_size() != found.size:
        raise UnsupportedError(_mismatch(found, library, f"sees {comm.Get_size()} of the {found.size} ranks"))
    return comm


def check_library(found: Launched, library: str) -> None:
    """Raise UnsupportedError if a launcher started this rank whose own MPI is not `library` (as MPI_Get_library_version says)."""
    if found.by in (OPENMPI, HYDRA) and library.startswith("Open MPI") != (found.by == OPENMPI):
        raise UnsupportedError(_mismatch(found, library, "does not know that launcher"))


def _mismatch(found: Launched, library: str, fault: str) -> str:
    return (
        f"{found.by} started rank {found.rank} of {found.size}, but mpi4py uses {library}, which {fault}; "
        "start the ranks with the mpirun of that MPI (--mpi), or let mpi4py use the launcher's MPI library: "
        "MPI4PY_LIBMPI=/path/to/libmpi.so (mpi4py's wheels), or build mpi4py with it: pip install --no-binary mpi4py mpi4py"
    )


def _read(by: str, names: list[str], env: Mapping[str, str]) -> Launched | None:
    rank, size, local = names
    if not (env.get(rank) and env.get(size)):
        return None
    return Launched(by, _number(env, rank, 0), _number(env, size, 1), _number(env, local, 0) if env.get(local) else None)


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name) or str(default)
    if not text.isdecimal():
        raise UnsupportedError(f"{name}={text}: this variable must be a number; unset it, or start the ranks anew")
    return int(text)


def _first_line(text: str) -> str:
    return " ".join(text.partition("\n")[0].partition(",")[0].split())


def _mpi4py_missing() -> bool:
    try:
        import mpi4py  # noqa: F401
    except ImportError:
        return True
    return False
