"""What a host is made of, and the kind of a cluster: the facts that a plan depends on and that outlive an allocation of nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from pydantic import PositiveInt

from .people import people_bit_per_s
from .record import Record, fingerprint


class Nic(Record):
    """One network interface, as the kernel tells of it."""

    name: str
    driver: str
    """The kernel's driver, such as mlx5_core, or where there is none the kind of device: bridge, bond, virtual."""
    bit_per_s: PositiveInt | None = None
    """The speed that the driver claims; virtual devices claim none, or one that means nothing."""
    carries: bool = False
    """Whether the backend's traffic between hosts goes through it, as far as that can be told."""

    @property
    def label(self) -> str:
        """Driver and speed for people, such as `mlx5_core at 25 Gbit/s`."""
        return f"{self.driver} at {people_bit_per_s(self.bit_per_s)}" if self.bit_per_s else self.driver


class Host(Record):
    """One host: nothing that is measured, nothing that depends on what runs there."""

    name: str
    slots: PositiveInt
    cores: PositiveInt
    """Online CPUs, as the kernel numbers them, whatever a rank is bound to."""
    cpu: str
    gpus: tuple[str, ...] = ()
    nics: tuple[Nic, ...] = ()

    @property
    def nic(self) -> Nic | None:
        """The interface that carries the traffic between hosts; None where that cannot be told."""
        return next((nic for nic in self.nics if nic.carries), None)


class HostKind(Record):
    """Hosts of a cluster that are alike, and how many of them there are."""

    count: PositiveInt
    cores: PositiveInt
    cpu: str
    gpus: tuple[str, ...] = ()
    nic: str | None = None
    """Driver of the interface between hosts; None on a single host, and where it is not known which one that is."""
    nic_bit_per_s: PositiveInt | None = None


class ClusterKind(Record):
    """Where a plan belongs: the backend, the shape, and what the hosts are made of. No names, no measured times."""

    backend: str
    nodes: PositiveInt
    ranks_per_node: PositiveInt
    hosts: tuple[HostKind, ...]
    """Sorted, so that the order of nodes doesn't matter."""

    @classmethod
    def of(cls, backend: str, hosts: Iterable[Host]) -> ClusterKind:
        """The kind of a cluster of these hosts, of which there is at least one, with as many slots on each."""
        every = list(hosts)
        made_of = [
            (
                host.cores,
                host.cpu,
                tuple(sorted(host.gpus)),
                host.nic.driver if host.nic and len(every) > 1 else None,
                host.nic.bit_per_s if host.nic and len(every) > 1 else None,
            )
            for host in every
        ]
        kinds = tuple(
            HostKind(count=made_of.count(kind), cores=kind[0], cpu=kind[1], gpus=kind[2], nic=kind[3], nic_bit_per_s=kind[4])
            for kind in sorted(set(made_of), key=repr)
        )
        return cls(backend=backend, nodes=len(every), ranks_per_node=every[0].slots, hosts=kinds)

    @property
    def fingerprint(self) -> str:
        """Hash of the facts: equal for clusters of one kind."""
        return fingerprint(self.model_dump(mode="json"))

    @property
    def label(self) -> str:
        """One line for people."""
        facts = {name: text for name, text_of in _FACTS.items() if (text := _of_all(self.hosts, text_of)) is not None}
        hosts = ", ".join(f"{name}: {text}" for name, text in facts.items())
        return f"{self.nodes} hosts x {self.ranks_per_node} ranks over {self.backend}; {hosts}"

    def differences(self, other: ClusterKind) -> list[str]:
        """What differs, such as `cores 2 -> 64`, this one's first. What either doesn't know is not compared."""
        pairs = {
            "backend": (self.backend, other.backend),
            "hosts": (str(self.nodes), str(other.nodes)),
            "ranks per host": (str(self.ranks_per_node), str(other.ranks_per_node)),
            **{name: (_of_all(self.hosts, text_of), _of_all(other.hosts, text_of)) for name, text_of in _FACTS.items()},
        }
        return [
            f"{name} {here} -> {there}" for name, (here, there) in pairs.items() if None not in (here, there) and here != there
        ]


def _of_all(kinds: Iterable[HostKind], text_of: Callable[[HostKind], str | None]) -> str | None:
    """One fact about all hosts: `2`, or `3 x 2, 1 x 64` where they differ; None where it is unknown of any."""
    counts: Counter[str] = Counter()
    for kind in kinds:
        text = text_of(kind)
        if text is None:
            return None
        counts[text] += kind.count
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{count} x {text}" for text, count in sorted(counts.items()))


def people_gpus(gpus: Iterable[str]) -> str:
    """GPUs for people: `8 x NVIDIA H100`, or `none`."""
    return ", ".join(f"{count} x {gpu}" for gpu, count in sorted(Counter(gpus).items())) or "none"


_FACTS: dict[str, Callable[[HostKind], str | None]] = {
    "cores": lambda kind: str(kind.cores),
    "CPU": lambda kind: kind.cpu,
    "GPUs": lambda kind: people_gpus(kind.gpus),
    "network card": lambda kind: kind.nic,
    "network speed": lambda kind: people_bit_per_s(kind.nic_bit_per_s) if kind.nic_bit_per_s else None,
}
