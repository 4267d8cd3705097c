"""`espresso doctor` and `espresso install-hook`: whether this environment can run plans, and the mend where it can't."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import psutil
from rich.table import Table

from ..core.errors import EspressoError, UnsupportedError
from ..core.host_facts import this_host
from ..core.native import library
from ..integrations import boot
from ..profiler.mpi_find import find_launcher
from .console import wide_console

PACKAGES = ("espresso-ds", "deepspeed", "torch", "transformers", "accelerate", "mpi4py")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the commands' arguments."""
    parser = commands.add_parser("doctor", help="check this environment", description=__doc__)
    parser.set_defaults(run=run)
    hook = commands.add_parser("install-hook", help="write the start-up hook into this environment (editable installs need it)")
    hook.set_defaults(run=run_install_hook)


def run(args: argparse.Namespace) -> None:
    """Print what was found; raise UnsupportedError if plans cannot run here."""
    rows = [(name, *_version(name)) for name in PACKAGES]
    rows.append(("start-up hook", *_hook()))
    rows.append(("launcher flag", *_launcher_flag()))
    rows.append(("mpirun", *_mpirun()))
    optional = [
        ("MPI library", *mpi_library()),
        ("host name", *host_name()),
        ("network", *network()),
        ("native code", *_native()),
        ("triton", *_triton()),
        ("c++", bool(shutil.which("c++")), "DeepSpeed compiles its CPU kernels with it (CPU training only)"),
        ("ip, tc", bool(shutil.which("ip") and shutil.which("tc")), "launch/emulate shapes links with them (optional)"),
    ]
    table = Table("", "what", "found", title=f"espresso doctor ({sys.executable})")
    for name, good, text in rows + optional:
        table.add_row("[green]ok[/]" if good else "[red]no[/]", name, text)
    wide_console().print(table)
    bad = [name for name, good, _ in rows if not good]
    if bad:
        raise UnsupportedError(f"not ready: {', '.join(bad)}")


def mpi_library() -> tuple[bool, str]:
    """The MPI library that mpi4py takes, and whether ranks that the mpirun found starts would see each other with it."""
    try:
        import mpi4py

        mpi4py.rc.initialize = False  # only asked for its name
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there and finds no library
        return False, f"{error}; profiles and benches then need torchrun or srun, or `pip install espresso-ds[mpi]`"
    library = " ".join(MPI.Get_library_version().partition("\n")[0].partition(",")[0].strip("\0").split())
    try:
        launcher = find_launcher()
    except EspressoError:  # a row of its own says so
        return True, library
    if launcher.kind != "srun" and (launcher.kind == "openmpi") != library.startswith("Open MPI"):
        own = launcher.library or "/path/to/libmpi.so"
        return False, f"mpi4py takes {library}, and {launcher.program} is {launcher.title}: export MPI4PY_LIBMPI={own}"
    return True, f"{library}, as {launcher.title}'s mpirun wants it"


def host_name() -> tuple[bool, str]:
    """Whether other hosts can reach this one by the address of its name, which gloo listens on unless told otherwise."""
    name, chosen = socket.gethostname(), os.environ.get("GLOO_SOCKET_IFNAME")
    if chosen:
        here = psutil.net_if_addrs()
        if missing := [each for each in chosen.split(",") if each not in here]:
            return False, f"GLOO_SOCKET_IFNAME={chosen}: no interface {missing[0]!r} here; there are {', '.join(here)}"
        return True, f"{name}; gloo takes {chosen} (GLOO_SOCKET_IFNAME)"
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        return False, f"{name} has no address ({error}): gloo between hosts needs GLOO_SOCKET_IFNAME, or a line in /etc/hosts"
    if address.startswith("127."):
        return False, f"{name} is {address}, loopback: gloo between hosts needs GLOO_SOCKET_IFNAME, or another line in /etc/hosts"
    return True, f"{name} is {address}"


def network() -> tuple[bool, str]:
    """The network cards, with what their drivers claim, and which of them gloo's traffic between hosts would take."""
    nics = this_host(socket.gethostname(), "gloo").nics
    listed = [f"{nic.name} ({nic.label}){', gloo takes it' if nic.carries else ''}" for nic in nics]
    return bool(listed), "; ".join(listed) or "no interface but loopback: one host only"


def _native() -> tuple[bool, str]:
    if library() is None:
        return False, "planning runs in plain Python and codecs in plain torch: install g++, then espresso_ds again"
    from ..compressors.native import cpu_level  # brings torch

    return True, f"the planner's timeline, codecs with {cpu_level()} instructions"


def _triton() -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "codecs on GPUs run in plain torch; `pip install triton` (optional)"
    return True, f"{importlib.metadata.version('triton')}, for codecs on GPUs"


def run_install_hook(args: argparse.Namespace) -> None:
    """Write the hook file where this environment's Python reads it."""
    path = Path(sysconfig.get_path("purelib")) / boot.HOOK_FILE
    path.write_text(boot.HOOK_LINE + "\n")
    print(f"{path}: every Python of this environment now knows plans; remove it with `rm {path}`")


def _version(name: str) -> tuple[bool, str]:
    try:
        return True, importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False, f"missing: pip install {name}"


def _hook() -> tuple[bool, str]:
    if boot.hook_file_installed():
        return True, boot.HOOK_FILE
    return False, "missing: run `espresso install-hook` (on every host)"


def _launcher_flag() -> tuple[bool, str]:
    probe = "from deepspeed.launcher.runner import parse_args; parse_args(['--help'])"
    try:
        shown = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, env=dict(os.environ))
    except subprocess.TimeoutExpired:
        return False, "importing deepspeed took over 120 s"
    good = "--espresso_config" in shown.stdout
    return (
        good,
        "deepspeed knows --espresso_config" if good else f"deepspeed does not know --espresso_config {shown.stderr[-200:]}",
    )


def _mpirun() -> tuple[bool, str]:
    try:
        launcher = find_launcher()
    except EspressoError as error:
        return False, str(error)
    return True, f"{launcher.program} ({launcher.title})"
