"""Hosts and their slots, from all the forms in which clusters write them. Imports nothing outside the standard library.

Every function gives a dict of host to slots (ranks), in the order of ranks, and raises `Fault` with the text and the cure.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

MPIJOB_HOSTFILE = Path("/etc/mpi/hostfile")  # where Kubeflow's MPI operator puts it
FORMS = {
    "deepspeed": "{host} slots={slots}",
    "openmpi": "{host} slots={slots}",
    "mpich": "{host}:{slots}",
    "impi": "{host}:{slots}",
}
"""Lines of a hostfile by who reads it."""

_HOST = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?"
_LINE = re.compile(rf"(?:[^\s@]+@)?(?P<host>{_HOST})(?::(?P<colon>\d+))?(?P<words>(?:\s+[\w-]+\s*=\s*\S+)*)")
_WORD = re.compile(r"([\w-]+)\s*=\s*(\S+)")
_REPEATED = re.compile(r"(\d+)(?:\(x(\d+)\))?")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_MOST = 100_000  # hosts: a typing error such as [1-10000000] is not to fill the memory


class Fault(Exception):
    """A list of hosts that cannot be read; says what and how to mend it."""


def expand_hostlist(text: str) -> list[str]:
    """The hosts of a Slurm list such as `gpu[07-09,12],rack[0-1]n[1-2]`, as `scontrol show hostnames` prints them.

    A range has as many digits as its first number. Where there are several brackets the last one runs fastest.
    """
    found: list[str] = []
    for item in _items(text):
        parts = re.split(r"\[([^\[\]]*)\]", item)
        if not item or any("[" in part or "]" in part for part in parts):
            raise Fault(f"{text!r}: {item!r} is no host or list of hosts; write node[01-03,07]")
        choices = [_range(part, text) if index % 2 else [part] for index, part in enumerate(parts)]
        if len(found) + math.prod(map(len, choices)) > _MOST:
            raise Fault(f"{text!r}: over {_MOST} hosts")
        found += map("".join, itertools.product(*choices))
    return found


def expand_counts(text: str) -> list[int]:
    """The numbers of a Slurm list such as `2(x3),1`, which stands for 2, 2, 2, 1."""
    found: list[int] = []
    for item in text.split(","):
        match = _REPEATED.fullmatch(item)
        if match is None or int(match[2] or 1) > _MOST:
            raise Fault(f"{text!r}: {item!r} is not of the form 2 or 2(x3)")
        found += [int(match[1])] * int(match[2] or 1)
    return found


def from_slurm(env: Mapping[str, str]) -> dict[str, int]:
    """Hosts of a Slurm allocation. Slots: its tasks per node, else its GPUs per node, else 1, which is what srun starts.

    SLURM_TASKS_PER_NODE counts tasks only where the job asked for some; without, it counts CPUs.
    """
    hosts = expand_hostlist(env.get("SLURM_JOB_NODELIST") or env["SLURM_NODELIST"])
    if env.get("SLURM_NTASKS") or env.get("SLURM_NTASKS_PER_NODE"):
        counts = expand_counts(env.get("SLURM_TASKS_PER_NODE") or f"{env.get('SLURM_NTASKS_PER_NODE', '')}(x{len(hosts)})")
    else:
        counts = expand_counts(env.get("SLURM_GPUS_ON_NODE") or "1") * len(hosts)
    if len(counts) != len(hosts):
        raise Fault(f"Slurm names {len(hosts)} hosts and the tasks of {len(counts)}; give --slots N")
    return _merged(zip(hosts, counts, strict=True), "SLURM_JOB_NODELIST", repeated=False)


def from_pbs(path: Path) -> dict[str, int]:
    """Hosts of PBS_NODEFILE (PBS Pro, OpenPBS, Torque): a line for every rank."""
    return _merged(((line, 1) for line in _lines(path)), str(path), repeated=True)


def from_lsf(text: str) -> dict[str, int]:
    """Hosts of LSB_MCPU_HOSTS (LSF): `hostA 2 hostB 4`."""
    words = text.split()
    if len(words) % 2 or not all(word.isdecimal() for word in words[1::2]):
        raise Fault(f"LSB_MCPU_HOSTS={text!r} is not of the form `hostA 2 hostB 4`")
    return _merged(zip(words[::2], map(int, words[1::2]), strict=True), "LSB_MCPU_HOSTS", repeated=True)


def from_file(path: Path) -> dict[str, int]:
    """Hosts of a hostfile in any form: `host slots=2` (DeepSpeed, Open MPI, MPIJob), `host:2` (MPICH, Intel MPI), `host`.

    A host without a number has one slot, and a host in several such lines as many. Users and other words are left out.
    """
    pairs: list[tuple[str, int]] = []
    sized: dict[str, bool] = {}
    for line in _lines(path):
        match = _LINE.fullmatch(line)
        if match is None:
            raise Fault(f"{path}: {line!r} is not of the form `host slots=2`, `host:2` or `host`")
        host, given = match["host"], match["colon"] or dict(_WORD.findall(match["words"])).get("slots")
        if given is not None and not given.isdecimal():
            raise Fault(f"{path}: {line!r}: slots={given} is no number")
        if sized.setdefault(host, given is not None) != (given is not None) or (given is not None and host in dict(pairs)):
            raise Fault(f"{path}: host {host!r} stands there twice; give all its slots in one line")
        pairs.append((host, int(given or 1)))
    return _merged(pairs, str(path), repeated=True)


def from_environment(env: Mapping[str, str] = os.environ, mpijob: Path = MPIJOB_HOSTFILE) -> tuple[dict[str, int], str]:
    """Hosts of the allocation that this process runs in, and what said so: Slurm, PBS, LSF or an MPIJob."""
    if env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST"):
        return from_slurm(env), f"Slurm job {env.get('SLURM_JOB_ID', '?')}"
    if env.get("PBS_NODEFILE"):
        return from_pbs(Path(env["PBS_NODEFILE"])), f"PBS_NODEFILE={env['PBS_NODEFILE']}"
    if env.get("LSB_MCPU_HOSTS"):
        return from_lsf(env["LSB_MCPU_HOSTS"]), "LSB_MCPU_HOSTS"
    if mpijob.exists():
        return from_file(mpijob), str(mpijob)
    raise Fault(
        "this is no allocation of Slurm, PBS or LSF and no MPIJob (SLURM_JOB_NODELIST, PBS_NODEFILE, LSB_MCPU_HOSTS are not set, "
        f"{mpijob} does not exist); name a hostfile"
    )


def render(slots: Mapping[str, int], form: str) -> str:
    """The text of a hostfile in one of `FORMS`."""
    return "".join(FORMS[form].format(host=host, slots=count) + "\n" for host, count in slots.items())


def _items(text: str) -> list[str]:
    """Parts of a list between the commas that are in no bracket."""
    items, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            items.append("")
        else:
            items[-1] += letter
    return items


def _range(text: str, whole: str) -> list[str]:
    """The numbers between two brackets, such as `01-03,07`."""
    found: list[str] = []
    for item in text.split(","):
        match = _RANGE.fullmatch(item)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if match is None or not first <= last <= first + _MOST:
            raise Fault(f"{whole!r}: {item!r} is no range; write 01-03 or 07, the smaller number first, fewer than {_MOST} hosts")
        found += [f"{number:0{len(match[1])}d}" for number in range(first, last + 1)]
    return found


def _lines(path: Path) -> list[str]:
    """Lines without comments and blanks."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Fault(f"{path}: cannot read this hostfile: {error}") from None
    return [text for line in lines if (text := line.partition("#")[0].strip())]


def _merged(pairs: Iterable[tuple[str, int]], where: str, repeated: bool) -> dict[str, int]:
    """Slots by host; where hosts may be repeated their slots are added."""
    slots: dict[str, int] = {}
    for host, count in pairs:
        if re.fullmatch(_HOST, host) is None:
            raise Fault(f"{where}: {host!r} is no host name")
        if count < 1:
            raise Fault(f"{where}: host {host!r} has {count} slots; give at least one, or leave it out")
        if host in slots and not repeated:
            raise Fault(f"{where}: host {host!r} stands there twice")
        slots[host] = slots.get(host, 0) + count
    if not slots:
        raise Fault(f"{where}: names no host")
    return slots
