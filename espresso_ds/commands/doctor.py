"""`espresso doctor` and `espresso install-hook`: whether this environment can run plans, and the mend where it can't."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..core.errors import EspressoError, UnsupportedError
from ..core.native import library
from ..integrations import boot
from ..profiler.mpi_launch import find_mpirun

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
        ("native code", *_native()),
        ("triton", *_triton()),
        ("c++", bool(shutil.which("c++")), "DeepSpeed compiles its CPU kernels with it (CPU training only)"),
        ("ip, tc", bool(shutil.which("ip") and shutil.which("tc")), "launch/emulate shapes links with them (optional)"),
    ]
    table = Table("", "what", "found", title=f"espresso doctor ({sys.executable})")
    for name, good, text in rows + optional:
        table.add_row("[green]ok[/]" if good else "[red]no[/]", name, text)
    Console().print(table)
    bad = [name for name, good, _ in rows if not good]
    if bad:
        raise UnsupportedError(f"not ready: {', '.join(bad)}")


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
        return True, find_mpirun()
    except EspressoError as error:
        return False, str(error)
