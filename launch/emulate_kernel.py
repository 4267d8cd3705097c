"""The few Linux calls that emulated hosts are made of and that Python 3.11 does not offer: namespaces, mounts, death signals."""

from __future__ import annotations

import ctypes
import os
import signal

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000  # linux/sched.h
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_BIND, MS_REC, MS_PRIVATE = 0x1, 0x1000, 0x4000, 0x40000  # linux/mount.h
PR_SET_PDEATHSIG = 1  # linux/prctl.h

_libc = ctypes.CDLL(None, use_errno=True)


class Missing(Exception):
    """This machine cannot emulate a cluster; the message says what it lacks and how to get it."""


def _call(function: str, *args: object) -> None:
    """Call a libc function that returns -1 on failure; raises OSError with its errno."""
    if getattr(_libc, function)(*args) == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), function)


def unshare(flags: int) -> None:
    """Move this process (for CLONE_NEWPID: its children) to new namespaces, unshare(2); raises OSError."""
    _call("unshare", flags)


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent dies, even if that is by SIGKILL (prctl(2), PR_SET_PDEATHSIG)."""
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def mount(source: str, target: str, kind: str | None = None, flags: int = 0) -> None:
    """mount(2); raises OSError."""
    _call("mount", source.encode(), target.encode(), kind.encode() if kind else None, ctypes.c_ulong(flags), None)


def enter(holder: int, directory: str) -> None:
    """Move this process to the host whose holder has process id `holder`, at the working directory `directory`.

    Raises OSError where the holder is gone or the directory does not exist on the host.
    """
    descriptors = [os.open(f"/proc/{holder}/ns/{kind}", os.O_RDONLY) for kind in ("uts", "ipc", "net", "mnt")]
    for descriptor in descriptors:
        _join(descriptor)
    os.chdir(directory)


def enter_network(pid: int) -> None:
    """Move this process to the network of process `pid`, and to nothing else of it; raises OSError."""
    _join(os.open(f"/proc/{pid}/ns/net", os.O_RDONLY))


def _join(descriptor: int) -> None:
    _call("setns", descriptor, 0)
    os.close(descriptor)
