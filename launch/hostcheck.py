"""Ask every host of a hostfile, by ssh and all at once, what it has; lay the answers side by side and name what differs.

Imports nothing outside the standard library, here and in what runs on the hosts.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

PACKAGES = ("torch", "deepspeed", "espresso-ds", "mpi4py")
OPTIONAL = {"mpi4py"}  # torchrun and srun do without
AT_ONCE = 32  # ssh processes; sshd and the network file system bear so many

# What runs on a host, read from stdin so that no shell quotes it.
PROBE = """
import importlib.metadata, json, os, platform, socket, sys, time
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
def address(name):
    try:
        return socket.gethostbyname(name)
    except OSError:
        return "none"
name = socket.gethostname()
hook = any(os.path.exists(os.path.join(folder, "espresso_ds_hook.pth")) for folder in sys.path)
told = {"name": name, "address": address(name), "python": platform.python_version(), "hook": "yes" if hook else "missing"}
told.update({package: version(package) for package in PACKAGES}, time=time.time())
print("@told " + json.dumps(told), flush=True)
"""


@dataclass(frozen=True)
class Answer:
    """What a host said: `told` by key, or the `fault` that kept it from answering.

    `ahead_s` is how far its clock is ahead of ours at least (behind, if negative): 0 where the difference lies within the time
    that the question took.
    """

    told: Mapping[str, str]
    ahead_s: float = 0.0
    fault: str = ""


def ask_all(hosts: Sequence[str] | Mapping[str, int], ssh: Sequence[str], python: str, timeout_s: float) -> list[Answer]:
    """The answers of all hosts, in their order."""
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(lambda host: ask(host, ssh, python, timeout_s), hosts))


def ask(host: str, ssh: Sequence[str], python: str, timeout_s: float) -> Answer:
    """The answer of one host."""
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={max(1, round(timeout_s))}"]  # never ask for a password
    command = [*ssh, *options, host, f"{shlex.quote(python)} -"]
    probe = f"PACKAGES = {PACKAGES!r}\n{PROBE}"
    before_s = time.time()
    try:
        done = subprocess.run(command, input=probe, capture_output=True, text=True, errors="replace", timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return Answer({}, fault=f"no answer in {timeout_s:g} s")
    except OSError as error:
        return Answer({}, fault=f"cannot run {ssh[0]}: {error.strerror}")
    after_s = time.time()
    lines = [line for line in done.stdout.splitlines() if line.startswith("@told ")]  # login files may print too
    if not lines:
        said = (done.stderr or done.stdout).strip().splitlines()
        return Answer({}, fault=said[-1] if said else f"ssh ended with status {done.returncode} and said nothing")
    told = json.loads(lines[-1].removeprefix("@told "))
    clock_s = told.pop("time")
    return Answer(told, ahead_s=clock_s - min(max(clock_s, before_s), after_s))


def faults(hosts: Sequence[str] | Mapping[str, int], answers: Sequence[Answer], clock_s: float) -> list[str]:
    """What is wrong, a sentence each, with the cure; hosts are compared with what most of them have."""
    found = [f"{host}: {answer.fault}" for host, answer in zip(hosts, answers, strict=True) if answer.fault]
    there = {host: answer for host, answer in zip(hosts, answers, strict=True) if not answer.fault}
    for key in ("python", *PACKAGES):
        counted = Counter(answer.told[key] for answer in there.values())
        most = counted.most_common(1)[0][0] if counted else ""
        if most == "missing" and len(counted) == 1 and key not in OPTIONAL:
            found.append(f"{key} is installed on no host: pip install {key}")
        for host, answer in there.items():
            if answer.told[key] != most:
                found.append(f"{host}: {key} is {answer.told[key]}, others have {most}; install the same on every host")
    for host, answer in there.items():
        if answer.told["hook"] == "missing" and answer.told["espresso-ds"] != "missing":
            found.append(f"{host}: the start-up hook is missing; run `espresso install-hook` there")
        if abs(answer.ahead_s) > clock_s:
            side = "ahead of" if answer.ahead_s > 0 else "behind"
            found.append(f"{host}: its clock is at least {abs(answer.ahead_s):.0f} s {side} ours; let ntp or chrony set it")
        if len(there) > 1 and (answer.told["address"].startswith("127.") or answer.told["address"] == "none"):
            found.append(
                f"{host}: its name {answer.told['name']} resolves to {answer.told['address']}, where gloo cannot be reached; "
                "mend /etc/hosts or export GLOO_SOCKET_IFNAME=<interface>"
            )
    named = Counter(answer.told["name"] for answer in there.values())
    for name in sorted(name for name, count in named.items() if count > 1):
        same = [host for host, answer in there.items() if answer.told["name"] == name]
        found.append(f"{' and '.join(same)} are one machine, {name}; give all its slots in one line")
    return found


def table(slots: Mapping[str, int], answers: Sequence[Answer]) -> str:
    """The answers as columns."""
    head = ["host", "slots", "name", "address", "python", *PACKAGES, "hook", "clock"]
    rows = [head]
    for (host, count), answer in zip(slots.items(), answers, strict=True):
        if answer.fault:
            rows.append([host, str(count), "unreachable", *[""] * (len(head) - 3)])
            continue
        clock = f"{answer.ahead_s:+.0f} s" if abs(answer.ahead_s) >= 1 else "same"
        rows.append([host, str(count), *(answer.told[key] for key in ("name", "address", "python", *PACKAGES, "hook")), clock])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
