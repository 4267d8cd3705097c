"""How profiles and traces are started on the cluster: DeepSpeed's own launcher for the script, mpirun or srun for our own ranks.

Where the ranks are already there (`torchrun`, `mpirun` or `srun` started this very command many times), each goes on in place.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..core.errors import UnsupportedError
from ..profiler.mpi_find import KINDS, find_launcher
from ..profiler.mpi_launch import choose, mpirun_command
from ..profiler.mpi_world import Launched, launched

THREADS = [
    *("OMP_NUM_THREADS", "DS_ACCELERATOR", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "PYTHONPATH"),
    *("LD_LIBRARY_PATH", "MPI4PY_LIBMPI", "MPI4PY_MPIABI", "MASTER_ADDR"),
]
"""Variables that ranks on other hosts get too, where they are set."""

_DEEPSPEED = {"openmpi": "openmpi", "mpich": "mpich", "impi": "impi", "srun": "slurm"}
_WHERE = ("hostfile", "ranks", "mpi", "launch")


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to run: hosts of a hostfile, a Slurm allocation, or ranks on this machine."""
    group = parser.add_argument_group(
        "where to run", "Under torchrun, mpirun or srun none of these is needed: the ranks are already there."
    )
    group.add_argument("-H", "--hostfile", type=Path, help="lines `host slots=N`, as for deepspeed and mpirun")
    group.add_argument("--ranks", type=int, help="ranks on this machine, where there is no hostfile (with srun: tasks)")
    group.add_argument(
        "--mpi",
        choices=KINDS,
        help="what starts our ranks (default: srun in a Slurm allocation where neither hosts nor ranks are given, "
        "else the mpirun that is found, whichever MPI it is of)",
    )


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """How the user's script is launched."""
    group = parser.add_argument_group("how to launch the script")
    group.add_argument("--launcher", help="DeepSpeed launcher for the hostfile (default: the one of --mpi)")
    group.add_argument("--launcher-args", default="", help="passed on to DeepSpeed's --launcher_args")
    group.add_argument("--master-port", type=int, default=29531, help="(default: %(default)s)")
    group.add_argument(
        "--launch", metavar="COMMAND", help='use this instead, such as "torchrun --nproc-per-node 2" or "accelerate launch"'
    )


def script_command(args: argparse.Namespace, script: Sequence[str]) -> list[str]:
    """The command that runs the user's script on every rank.

    Raises:
        UnsupportedError: neither a hostfile, nor a number of ranks, nor a launch command is given, and this is no Slurm
            allocation; no launcher is installed; or this process is itself one of several ranks.
    """
    _check_alone()
    if args.launch:
        return [*shlex.split(args.launch), *script]
    if args.hostfile is None and choose(None, args.ranks, args.mpi) == "srun":
        # DeepSpeed's own Slurm launcher wants a hostfile, and the ranks an MPI that was built for Slurm.
        rank = [sys.executable, "-u", "-m", "espresso_ds.commands.as_rank"]
        return mpirun_command(None, args.ranks, [*rank, *script], mpi="srun")
    beside = Path(sys.executable).with_name("deepspeed")
    deepspeed = [str(beside) if beside.exists() else "deepspeed", "--master_port", str(args.master_port)]
    if args.hostfile is not None:
        launcher = args.launcher or _DEEPSPEED[find_launcher(choose(args.hostfile, args.ranks, args.mpi)).kind]
        deepspeed += ["--hostfile", str(args.hostfile), "--launcher", launcher, "--force_multi"]
        if args.launcher_args:
            deepspeed += [f"--launcher_args={args.launcher_args}"]
    elif args.ranks is not None:
        deepspeed += ["--num_accelerators", str(args.ranks)]
    else:
        raise UnsupportedError("where shall the ranks run? give --hostfile FILE, --ranks N or --launch COMMAND")
    return [*deepspeed, *script]


def ranks_command(args: argparse.Namespace, module: str, *arguments: str) -> list[str]:
    """The command that runs one of our modules on every rank. Raises FileError, UnsupportedError as `script_command` does."""
    _check_alone()
    return mpirun_command(args.hostfile, args.ranks, [sys.executable, "-m", module, *arguments], THREADS, args.mpi)


def _check_alone() -> None:
    """Raise UnsupportedError in one of several ranks: each of them would start all ranks."""
    if (found := launched()) is not None and found.size > 1:
        raise UnsupportedError(
            f"this is rank {found.rank} of {found.size}, which {found.by} started; run this command once, without {found.by}: "
            "it starts the ranks itself (`espresso trace` and `espresso profile` do without)"
        )


def one_of_many(args: argparse.Namespace) -> Launched | None:
    """This process, if a launcher started it as one of several ranks; None where ranks are still to be started.

    Raises:
        UnsupportedError: it is one of several ranks, and the arguments ask for more of them: each rank would start them all.
    """
    found = launched()
    if found is None or found.size == 1:
        return None
    asked = [name for name in _WHERE if getattr(args, name, None) is not None]
    if asked:
        raise UnsupportedError(
            f"this is rank {found.rank} of {found.size}, which {found.by} started, and --{asked[0]} would start them once more; "
            f"leave out --{' --'.join(asked)}, or run the command once"
        )
    return found


def go_on_in_place(found: Launched, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
    """Become `python COMMAND` as the rank that this process is. Does not return.

    The process stays the one that the launcher started, with the files that it left open: MPICH's ranks talk to it by one.
    """
    if found.rank == 0:
        print(f"espresso: {found.by} already started {found.size} ranks: going on in place", file=sys.stderr, flush=True)
    os.execve(sys.executable, [sys.executable, *command], {**os.environ, **(env or {})})
