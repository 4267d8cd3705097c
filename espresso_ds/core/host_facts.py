"""What this host is made of, read from /proc and /sys: some milliseconds, no root, no torch.

What the files hold is said in proc(5), in the kernel's Documentation/ABI (sysfs-class-net, sysfs-class-infiniband) and, for the
drivers' own, in those of NVIDIA and AMD (kfd).
"""

from __future__ import annotations

import os
import platform
import re
import socket
from pathlib import Path

import psutil

from .hosts import Host, Nic

_LOOPBACK = "772"  # ARPHRD_LOOPBACK in linux/if_arp.h
_UP = 0x1  # RTF_UP in linux/route.h


def this_host(name: str, backend: str, root: Path = Path("/")) -> Host:
    """The facts about this host, with one slot.

    Args:
        name: by which ranks know this host.
        backend: torch's name of the backend between ranks, which says by which rules it picks an interface.
        root: where proc and sys are mounted.
    """
    carrier = _carrier(backend, name, root)
    return Host(name=name, slots=1, cores=os.cpu_count() or 1, cpu=_cpu(root), gpus=_gpus(root), nics=_nics(carrier, root))


def _cpu(root: Path) -> str:
    """The model as the kernel names it; on CPUs without such a name (ARM), implementer and part."""
    facts: dict[str, str] = {}
    for line in _text(root / "proc/cpuinfo").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            facts.setdefault(key.strip(), value.strip())
    if "model name" in facts:
        return " ".join(facts["model name"].split())
    parts = [f"{key} {facts[key]}" for key in ("CPU implementer", "CPU part") if key in facts]
    return " ".join([platform.machine(), *parts])


def _gpus(root: Path) -> tuple[str, ...]:
    """Models of all GPUs of the host, hidden from this process or not: CUDA_VISIBLE_DEVICES differs from launcher to launcher."""
    found = []
    for path in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        models = [line.partition(":")[2].strip() for line in _text(path).splitlines() if line.startswith("Model:")]
        found += [model if model.startswith("NVIDIA") else f"NVIDIA {model}" for model in models]
    for path in sorted((root / "sys/class/kfd/kfd/topology/nodes").glob("*/properties")):
        versions = [words[1] for line in _text(path).splitlines() if (words := line.split())[:1] == ["gfx_target_version"]]
        found += [f"AMD gfx {version}" for version in versions if version != "0"]  # 0: a CPU
    return tuple(found)


def _nics(carrier: str | None, root: Path) -> tuple[Nic, ...]:
    """All interfaces but loopback, then all RDMA devices, each by name."""
    found = []
    for path in sorted((root / "sys/class/net").glob("*")):
        if path.is_dir() and _text(path / "type") != _LOOPBACK:
            found.append(Nic(name=path.name, driver=_driver(path), bit_per_s=_bit_per_s(path), carries=path.name == carrier))
    for path in _rdma(root):
        rate = re.match(r"(\d+(?:\.\d+)?) Gb/sec", _text(path / "ports/1/rate"))
        bit_per_s = round(float(rate[1]) * 1e9) if rate else None
        found.append(Nic(name=path.name, driver=_driver(path), bit_per_s=bit_per_s, carries=path.name == carrier))
    return tuple(found)


def _rdma(root: Path) -> list[Path]:
    """InfiniBand and RoCE devices, which NCCL takes before any interface."""
    return sorted((root / "sys/class/infiniband").glob("*"))


def _driver(nic: Path) -> str:
    driver = nic / "device/driver"
    if driver.exists():
        return driver.resolve().name
    kind = [line.removeprefix("DEVTYPE=") for line in _text(nic / "uevent").splitlines() if line.startswith("DEVTYPE=")]
    return kind[0] if kind else "virtual"


def _bit_per_s(nic: Path) -> int | None:
    """The kernel gives Mbit/s, -1 or an error where the driver knows none."""
    text = _text(nic / "speed")
    return int(text) * 10**6 if text.isdigit() and int(text) > 0 else None


def _carrier(backend: str, name: str, root: Path) -> str | None:
    """The device of the backend's traffic, by the backend's own rule: what the user names, else gloo takes the interface of the
    host name's address, NCCL an RDMA device and then, as far as can be told from outside, the one of the default route.
    """
    if backend == "gloo":
        return os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0] or _interface_at(name)
    rdma = _rdma(root)
    if rdma and os.environ.get("NCCL_IB_DISABLE", "0") == "0":
        return rdma[0].name
    wanted = os.environ.get("NCCL_SOCKET_IFNAME", "").split(",")[0].removeprefix("=")
    if wanted and not wanted.startswith("^"):
        return next((path.name for path in sorted((root / "sys/class/net").glob(f"{wanted}*"))), None)
    return _default_route(root)


def _interface_at(name: str) -> str | None:
    """The interface that has the address to which the host's name resolves; None where that is none, or loopback's."""
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return None
    here = {nic: [each.address for each in every] for nic, every in psutil.net_if_addrs().items()}
    return next((nic for nic, addresses in here.items() if address in addresses and not address.startswith("127.")), None)


def _default_route(root: Path) -> str | None:
    """The interface of the first default route in /proc/net/route."""
    for line in _text(root / "proc/net/route").splitlines()[1:]:
        words = line.split()
        if len(words) > 3 and words[1] == "00000000" and int(words[3], 16) & _UP:
            return words[0]
    return None


def _text(path: Path) -> str:
    """The file's text without its last line end; empty where there is none or its driver refuses to answer."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
