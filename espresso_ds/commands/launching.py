"""How profiles and traces are started on the cluster: DeepSpeed's own launcher for the script, mpirun for our own ranks."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ..core.errors import UnsupportedError
from ..profiler.mpi_launch import mpirun_command

THREADS = ["OMP_NUM_THREADS", "DS_ACCELERATOR", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "PYTHONPATH"]
"""Variables that ranks on other hosts get too, where they are set."""


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to run: hosts of a hostfile, or ranks on this machine."""
    group = parser.add_argument_group("where to run")
    group.add_argument("-H", "--hostfile", type=Path, help="lines `host slots=N`, as for deepspeed and mpirun")
    group.add_argument("--ranks", type=int, help="ranks on this machine, where there is no hostfile")


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """How the user's script is launched."""
    group = parser.add_argument_group("how to launch the script")
    group.add_argument("--launcher", default="openmpi", help="DeepSpeed launcher for the hostfile (default: %(default)s)")
    group.add_argument("--launcher-args", default="", help="passed on to DeepSpeed's --launcher_args")
    group.add_argument("--master-port", type=int, default=29531, help="(default: %(default)s)")
    group.add_argument(
        "--launch", metavar="COMMAND", help='use this instead, such as "torchrun --nproc-per-node 2" or "accelerate launch"'
    )


def script_command(args: argparse.Namespace, script: Sequence[str]) -> list[str]:
    """The command that runs the user's script on every rank.

    Raises:
        UnsupportedError: neither a hostfile, nor a number of ranks, nor a launch command is given.
    """
    if args.launch:
        return [*shlex.split(args.launch), *script]
    beside = Path(sys.executable).with_name("deepspeed")
    deepspeed = [str(beside) if beside.exists() else "deepspeed", "--master_port", str(args.master_port)]
    if args.hostfile is not None:
        deepspeed += ["--hostfile", str(args.hostfile), "--launcher", args.launcher, "--force_multi"]
        if args.launcher_args:
            deepspeed += [f"--launcher_args={args.launcher_args}"]
    elif args.ranks is not None:
        deepspeed += ["--num_accelerators", str(args.ranks)]
    else:
        raise UnsupportedError("where shall the ranks run? give --hostfile FILE, --ranks N or --launch COMMAND")
    return [*deepspeed, *script]


def ranks_command(args: argparse.Namespace, module: str, *arguments: str) -> list[str]:
    """The mpirun command that runs one of our modules on every rank. Raises FileError, UnsupportedError."""
    return mpirun_command(args.hostfile, args.ranks, [sys.executable, "-m", module, *arguments], THREADS)
