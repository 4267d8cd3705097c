"""The command that starts one process per rank, in the words of each launcher.

Ranks are numbered host by host, as DeepSpeed does, and no rank is bound to cores, as training's are not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..core.errors import FileError, UnsupportedError
from .mpi_find import Launcher, find_launcher

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
            raise FileError(
                f"{path}, line {number}: {text!r} is not of the form `worker-1 slots=2` with at least one slot; "
                "`launch/hostfile write FILE` makes that form of any other"
            )
        if match["host"] in slots:
            raise FileError(f"{path}, line {number}: host {match['host']!r} stands there twice; give all its slots in one line")
        slots[match["host"]] = int(match["slots"])
    if not slots:
        raise FileError(f"{path}: this hostfile names no host; write lines like `worker-1 slots=2`")
    return slots


def mpirun_command(
    hostfile: str | Path | None, ranks: int | None, args: Sequence[str], export: Sequence[str] = (), mpi: str | None = None
) -> list[str]:
    """Build the command that runs `args` once per rank.

    Args:
        hostfile: None for ranks on this machine, or for those of a Slurm allocation.
        ranks: how many, filling the hosts in order; None for all slots of the hostfile, or all tasks of the allocation.
        args: program and arguments, such as `[sys.executable, "-m", "espresso_ds.profiler.cluster", ...]`.
        export: names of environment variables that the ranks on other hosts get too; those that are not set are left out.
        mpi: one of `mpi_find.KINDS`; None for srun in a Slurm allocation where neither hostfile nor ranks are given, and
            otherwise for the mpirun that is found.

    Raises:
        FileError: see `read_hostfile`.
        UnsupportedError: no such launcher is installed, srun is asked for outside of an allocation, hosts are uneven where the
            launcher wants them even, nobody says how many ranks, or there are fewer slots than ranks.
    """
    launcher, slots = find_launcher(choose(hostfile, ranks, mpi)), None
    if hostfile is not None:
        slots = _filled(read_hostfile(hostfile), ranks, hostfile)
    elif ranks is not None and ranks < 1:
        raise UnsupportedError(f"{ranks} ranks: give at least one")
    variables = {name: os.environ[name] for name in export if name in os.environ}
    if launcher.library is not None and "MPI4PY_LIBMPI" not in variables:
        # mpi4py's wheels serve any MPI and take the library that they find first, which may be that of another launcher.
        variables["MPI4PY_LIBMPI"] = launcher.library
    if launcher.kind == "srun":
        return [*_srun(launcher, slots, ranks), *args]
    if slots is None:
        if ranks is None:
            raise UnsupportedError(
                "how many ranks? give --hostfile FILE or --ranks N, or run in a Slurm allocation (salloc, sbatch)"
            )
        slots = {"localhost": ranks}
    start = {"openmpi": _openmpi, "mpich": _mpich, "impi": _impi}[launcher.kind]
    return [*start(launcher, slots, hostfile, variables), *args]


def choose(hostfile: str | Path | None, ranks: int | None, mpi: str | None) -> str | None:
    """The kind to look for: the one asked for, srun where only a Slurm allocation says where to run, None for any MPI.

    Raises:
        UnsupportedError: srun is asked for and there is no allocation.
    """
    allocated = "SLURM_JOB_ID" in os.environ
    if mpi == "srun" and not allocated:
        raise UnsupportedError(
            "--mpi srun: this is not inside a Slurm allocation; get one by salloc or sbatch (launch/slurm.sbatch)"
        )
    return "srun" if mpi is None and allocated and hostfile is None and ranks is None else mpi


def _filled(slots: dict[str, int], ranks: int | None, hostfile: str | Path) -> dict[str, int]:
    """The slots that are used when so many ranks fill the hosts in order."""
    total = sum(slots.values())
    left = total if ranks is None else ranks
    if not 1 <= left <= total:
        raise UnsupportedError(f"{hostfile}: {total} slots are too few for {left} ranks; add hosts or slots")
    used = {}
    for host, count in slots.items():
        if left:
            used[host] = min(count, left)
            left -= used[host]
    return used


def _even(launcher: Launcher, slots: Mapping[str, int]) -> int:
    """Ranks of every host, for launchers that know one number alone."""
    counts = set(slots.values())
    if len(counts) > 1:
        listed = ", ".join(f"{host}: {count}" for host, count in slots.items())
        raise UnsupportedError(f"{launcher.title} starts the same number of ranks on every host, not {listed}; make them even")
    return counts.pop()


def _openmpi(
    launcher: Launcher, slots: Mapping[str, int], hostfile: str | Path | None, variables: Mapping[str, str]
) -> list[str]:
    """Open MPI 4 and 5 (PRRTE): mpirun(1). Only variables named by -x reach other hosts."""
    ranks = sum(slots.values())
    # `host:slots` says how many slots there are: the cores are not to be counted
    where = ["--host", f"localhost:{ranks}"] if hostfile is None else ["--hostfile", str(hostfile)]
    command = [launcher.program, *where, "-n", str(ranks), "--map-by", "slot", "--bind-to", "none"]
    if os.geteuid() == 0:
        # Open MPI refuses to run as root unless told; only in a container or an emulated cluster is the user root.
        command.append("--allow-run-as-root")
    for name, value in variables.items():
        command += ["-x", name if os.environ.get(name) == value else f"{name}={value}"]
    return command


def _mpich(launcher: Launcher, slots: Mapping[str, int], hostfile: str | Path | None, variables: Mapping[str, str]) -> list[str]:
    """MPICH's Hydra and its descendants (MVAPICH): the whole environment reaches every rank.

    Which remote shell it uses (ssh, or srun inside an allocation) is left to Hydra and to the user's HYDRA_LAUNCHER.
    """
    where = ["-launcher", "fork"] if hostfile is None else []
    hosts = ",".join(f"{host}:{count}" for host, count in slots.items())
    command = [launcher.program, *where, "-hosts", hosts, "-n", str(sum(slots.values())), "-bind-to", "none", "-genvall"]
    return [*command, *_genv(variables)]


def _impi(launcher: Launcher, slots: Mapping[str, int], hostfile: str | Path | None, variables: Mapping[str, str]) -> list[str]:
    """Intel MPI's Hydra: hosts and ranks per host are told apart, and pinning is a variable.

    Inside an allocation it would take the scheduler's ranks per host over -ppn unless a variable of its own says otherwise.
    """
    per_host, where = _even(launcher, slots), ["-bootstrap", "fork"] if hostfile is None else []
    command = ["env", "I_MPI_JOB_RESPECT_PROCESS_PLACEMENT=0", launcher.program, *where, "-hosts", ",".join(slots)]
    command += ["-ppn", str(per_host), "-n", str(sum(slots.values())), "-genvall"]
    return [*command, *_genv({"I_MPI_PIN": "0", **variables})]


def _genv(variables: Mapping[str, str]) -> list[str]:
    """Set for every rank what its environment does not have yet; -genvall passes the rest."""
    new = {name: value for name, value in variables.items() if os.environ.get(name) != value}
    return [word for name, value in new.items() for word in ("-genv", name, value)]


def _srun(launcher: Launcher, slots: Mapping[str, int] | None, ranks: int | None) -> list[str]:
    """Slurm's srun: nodes and tasks are those of the allocation where nothing else is asked for; the environment goes along."""
    command = [launcher.program, "--distribution=block", "--cpu-bind=none", "--kill-on-bad-exit=1", "--export=ALL"]
    if slots is not None:
        command += [f"--nodelist={','.join(slots)}", f"--nodes={len(slots)}", f"--ntasks-per-node={_even(launcher, slots)}"]
        ranks = sum(slots.values())
    if ranks is not None:
        command.append(f"--ntasks={ranks}")
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
        command.append(f"--cpus-per-task={cpus}")  # since Slurm 22.05 srun does not inherit sbatch's
    return command
