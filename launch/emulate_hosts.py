"""Emulated hosts: namespaces joined by a shaped switch, made of nothing that outlives their processes.

One picture holds for the whole file (two hosts):

    host0  eth0 10.77.0.1 ── port0 ┐            tbf on eth0  shapes what the host sends
                                   ├ bridge     tbf on portN shapes what the host receives
    host1  eth0 10.77.0.2 ── port1 ┘            both at the same rate: a full-duplex NIC

A host is a holder process asleep in network, mount, UTS and IPC namespaces of its own; to run something "on" the host is to enter
the holder's namespaces and exec (`enter`). The switch lives in the network namespace of the init process, which is process 1 of a
PID namespace that the hosts share. No namespace has a name under /run/netns and no file is written outside them, so the kernel
removes everything with the last process, and every process with process 1.

Every host sees the machine's files (a shared file system, as on most clusters) except for what a real host has to itself: its
name, /etc/hosts, /dev/shm, /sys (without its submounts, such as cgroups), loopback, and the directories that were asked to be
private: host0 has the machine's, every other host an empty one of its own. Process ids are common to all hosts. The links have a
rate and no latency of their own. Nothing here imports outside the standard library.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import emulate_kernel as kernel
from emulate_kernel import Missing

OF_A_HOST = kernel.CLONE_NEWNS | kernel.CLONE_NEWUTS | kernel.CLONE_NEWIPC | kernel.CLONE_NEWNET
SHARED = Path("/dev/shm/emulate")  # the cluster's own files, on a tmpfs that exists in these mount namespaces only
HOSTFILE, STATE = SHARED / "hostfile", SHARED / "state.json"
TOOLS_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])  # sbin: not on every user's PATH
MAX_HOSTS = 250
LIMITS_CURE = "see `sysctl user` for the limits on namespaces"
MOUNTS_CURE = "this container or security module forbids mounts; allow them (docker: --privileged) or run outside it"


@dataclass(frozen=True)
class Cluster:
    """What to emulate.

    Attributes:
        hosts: number of hosts, 1 to 250, named host0, host1, ...
        slots: processes per host, as the hostfile says it.
        rate: rate of every host's link in bit/s and in each direction; None leaves the links unshaped.
        env: environment that a login on any of the hosts starts with.
        directory: working directory that a login on any of the hosts starts in.
        private: absolute paths of directories that host0 alone has; on the others they are empty.
    """

    hosts: int
    slots: int
    rate: float | None
    env: Mapping[str, str]
    directory: str
    private: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The host names, rank order."""
        return [f"host{index}" for index in range(self.hosts)]


def address(index: int) -> str:
    """IPv4 address of host `index` on the private network 10.77.0.0/24."""
    return f"10.77.0.{index + 1}"


def burst_bytes(rate: float) -> int:
    """Bucket of the token bucket filter for a rate in bit/s.

    The kernel hands tbf segments of 64 KiB plus headers; a smaller bucket cuts each into packets, at 5 to 20 times the CPU.
    With these sizes one TCP stream measures 96% of the rate from 100 Mbit/s to 1 Gbit/s.

    After a pause a whole bucket passes at once, which hides the rate from messages of that size: EMULATE_BURST in the environment
    gives another size, at that price.
    """
    if (given := os.environ.get("EMULATE_BURST")) is not None:
        return int(given)
    return 80_000 if rate <= 400e6 else 128 * 1024


def shaping(rate: float) -> str:
    """What `tc qdisc ... dev DEVICE` is told to shape a device to `rate` bit/s.

    100 ms of queue: what a sender is allowed to pile up before the switch drops, for several hosts sending to one.
    """
    return f"root tbf rate {rate:.0f}bit burst {burst_bytes(rate)} latency 100ms"


def tool(name: str) -> str:
    """Path of one of iproute2's programs; raises Missing."""
    path = shutil.which(name, path=TOOLS_PATH)
    if path is None:
        raise Missing(
            f"the program {name!r} is not installed; get iproute2 (apt install iproute2; dnf install iproute iproute-tc)"
        )
    return path


def _batch(name: str, lines: Sequence[str], needs: str, on: Callable[[], None] | None = None) -> None:
    """Run `ip` or `tc` on a list of its commands, on the switch or, by `on`, elsewhere; raises Missing with the cure `needs`."""
    done = subprocess.run([tool(name), "-batch", "-"], input="\n".join(lines), text=True, capture_output=True, preexec_fn=on)
    if done.returncode:
        raise Missing(f"`{name}` failed: {' '.join(done.stderr.split())} in {list(lines)}; {needs}")


def _attempt(what: str, cure: str, function: Callable[..., object], *args: object) -> None:
    try:
        function(*args)
    except OSError as error:
        raise Missing(f"cannot {what}: {error.strerror}; {cure}") from error


def _write_shared(cluster: Cluster) -> None:
    """Write what all hosts read: /etc/hosts, the hostfile, the ssh program."""
    (SHARED / "bin").mkdir(parents=True)
    lines = ["127.0.0.1 localhost", "::1 ip6-localhost"]
    for index, name in enumerate(cluster.names):
        # The second line answers reverse lookups by dual-stack servers (c10d's store, which warns without it); its name differs
        # so that looking up the host gives the plain address alone.
        lines += [f"{address(index)} {name}", f"::ffff:{address(index)} ip6-{name}"]
    (SHARED / "hosts").write_text("\n".join(lines) + "\n")
    HOSTFILE.write_text("".join(f"{name} slots={cluster.slots}\n" for name in cluster.names))
    ssh, program = SHARED / "bin" / "ssh", Path(__file__).with_name("emulate_ssh.py")
    # -E -S: the shim must not change with PYTHONPATH, nor run the .pth files of the environment it serves
    ssh.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -ES {shlex.quote(str(program))} "$@"\n')
    ssh.chmod(0o755)


def _ipv4_only() -> None:
    """Keep IPv6 off the network devices still to come: their neighbour discovery would be counted as the command's traffic."""
    switch = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")
    if switch.exists():
        _attempt("turn IPv6 off", MOUNTS_CURE, switch.write_text, "1")


def _furnish(name: str, empty: Sequence[str]) -> None:
    """Give the calling process a host of its own: namespaces, name, /dev/shm, /etc/hosts, /sys, and `empty` directories."""
    _attempt("make a host's namespaces", LIMITS_CURE, kernel.unshare, OF_A_HOST)
    _ipv4_only()
    socket.sethostname(name)
    shared = os.open(SHARED, os.O_RDONLY | os.O_DIRECTORY)
    _attempt("mount the host's /dev/shm", MOUNTS_CURE, kernel.mount, "tmpfs", "/dev/shm", "tmpfs")
    os.chmod("/dev/shm", 0o1777)
    SHARED.mkdir()
    _attempt("mount the cluster's files", MOUNTS_CURE, kernel.mount, f"/proc/self/fd/{shared}", str(SHARED), None, kernel.MS_BIND)
    os.close(shared)
    _attempt("replace /etc/hosts", MOUNTS_CURE, kernel.mount, str(SHARED / "hosts"), "/etc/hosts", None, kernel.MS_BIND)
    for directory in empty:
        _attempt(f"mount an empty {directory}", MOUNTS_CURE, kernel.mount, "tmpfs", directory, "tmpfs")
    try:
        kernel.mount("sysfs", "/sys", "sysfs", kernel.MS_RDONLY)
    except OSError as error:
        note = f"emulate: {name}: cannot mount a fresh /sys ({error.strerror}); count bytes with `ip -s -j link show eth0`"
        print(note, file=sys.stderr, flush=True)


def _hold(name: str, empty: Sequence[str], writer: int) -> None:
    """Be host `name` until killed; says on the pipe `writer` whether that worked."""
    message = "ready"
    try:
        _furnish(name, empty)
    except (Missing, OSError) as error:
        message = str(error)
    os.write(writer, message.encode())
    os.close(writer)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # a command's `pkill -f` must not end a host
    while message == "ready":
        signal.pause()


def _start_holder(name: str, empty: Sequence[str]) -> int:
    """Fork the process that keeps host `name` alive; returns its process id once the host is furnished. Raises Missing."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            _hold(name, empty, writer)
        finally:  # this copy of the program must never run on as process 1
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as answer:
        message = answer.read()
    if message != "ready":
        raise Missing(message or f"the process that holds {name} died at its start; is memory short?")
    return pid


def _wire(cluster: Cluster, holders: Sequence[int]) -> None:
    """Build the switch, one link per host and the shapers; raises Missing."""
    loopback = "link set lo up"
    bridge = "needs the kernel's bridge and veth drivers (modprobe bridge veth) and CAP_NET_ADMIN"
    _batch("ip", [loopback, "link add switch type bridge", "link set switch up"], bridge)
    shape = "needs tbf in the kernel (modprobe sch_tbf, or the distribution's kernel-modules-extra); --rate none does without"
    for index, holder in enumerate(holders):
        port, inside = f"port{index}", partial(kernel.enter, holder, "/")
        _batch("ip", [f"link add {port} type veth peer name eth0 netns {holder}", f"link set {port} master switch up"], bridge)
        _batch("ip", [loopback, f"addr add {address(index)}/24 dev eth0", "link set eth0 up"], bridge, inside)
        if cluster.rate is not None:
            _batch("tc", [f"qdisc add dev {port} {shaping(cluster.rate)}"], shape)
            _batch("tc", [f"qdisc add dev eth0 {shaping(cluster.rate)}"], shape, inside)


def _check_names(cluster: Cluster, holder: int) -> None:
    """Raise Missing unless host0 resolves every host's name as its /etc/hosts says."""
    ask = "import socket, sys; print(*[socket.gethostbyname(name) for name in sys.argv[1:]])"
    command = [sys.executable, "-ES", "-c", ask, *cluster.names]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=partial(kernel.enter, holder, "/"))
    if done.stdout.split() != [address(index) for index in range(cluster.hosts)]:
        found = done.stdout.strip() or done.stderr.strip().splitlines()[-1]
        raise Missing(
            f"host names do not resolve by /etc/hosts ({found}); put 'files' first in 'hosts:' of /etc/nsswitch.conf, stop nscd"
        )


def build(cluster: Cluster) -> dict[str, int]:
    """Build the cluster around the calling process, which must be process 1 of a new PID namespace.

    Returns the holder's process id for each host name. Raises Missing where the machine cannot.
    """
    _attempt("make the switch's namespaces", LIMITS_CURE, kernel.unshare, OF_A_HOST)
    _attempt("make mounts private", MOUNTS_CURE, kernel.mount, "none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    _attempt("mount a fresh /proc", MOUNTS_CURE, kernel.mount, "proc", "/proc", "proc")
    _attempt("mount /dev/shm", MOUNTS_CURE, kernel.mount, "tmpfs", "/dev/shm", "tmpfs")
    _ipv4_only()
    _write_shared(cluster)
    holders = {name: _start_holder(name, cluster.private if index else ()) for index, name in enumerate(cluster.names)}
    _wire(cluster, list(holders.values()))
    _check_names(cluster, holders["host0"])
    STATE.write_text(json.dumps({"holders": holders, "env": dict(cluster.env), "directory": cluster.directory}))
    return holders


def eth0_bytes(holder: int) -> dict[str, int]:
    """Bytes that a host's eth0 sent and received so far, from the kernel's counters.

    A segment that the kernel passes on whole (64 KiB) counts its headers once.
    """
    for line in Path(f"/proc/{holder}/net/dev").read_text().splitlines():
        device, _, counters = line.partition(":")
        if device.strip() == "eth0":
            fields = counters.split()  # 8 receive columns, then 8 transmit columns; bytes first in each
            return {"tx_bytes": int(fields[8]), "rx_bytes": int(fields[0])}
    raise Missing(f"process {holder} has no eth0 any more: the command removed it")


def login(holder: int, name: str, argv: Sequence[str], env: Mapping[str, str], directory: str) -> None:
    """Replace this process by the program `argv` on a host; returns only by raising OSError."""
    kernel.enter(holder, directory)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these two, and exec would pass that on
        signal.signal(number, signal.SIG_DFL)
    os.execvpe(argv[0], list(argv), {**env, "HOSTNAME": name, "PWD": directory})


def run(cluster: Cluster, holders: Mapping[str, int], argv: Sequence[str]) -> int:
    """Run `argv` on host0 and reap every orphan of the cluster meanwhile; returns the exit status, 128 + n for signal n."""
    child = os.fork()
    if child == 0:
        code = 127
        try:
            login(holders["host0"], "host0", argv, cluster.env, cluster.directory)
        except OSError as error:
            print(f"emulate: cannot run {argv[0]!r}: {error.strerror}", file=sys.stderr, flush=True)
            code = 126 if isinstance(error, PermissionError) else 127
        finally:
            os._exit(code)
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        if pid in holders.values():
            raise Missing(f"process {pid}, which held a host, was killed; is memory short?")
