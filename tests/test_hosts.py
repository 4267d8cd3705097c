"""Facts about hosts from /proc and /sys, and the kind of a cluster that a plan is kept to."""

import hashlib
import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from planner_cases import cluster_of, codecs_of, nested_cluster_of
from plans import plan_for
from profile_files import named_trace

from espresso_ds.core.host_facts import this_host
from espresso_ds.core.hosts import ClusterKind, Host, Nic
from espresso_ds.core.option import Level
from espresso_ds.core.plan import Plan
from espresso_ds.core.profile import ClusterProfile, Link, RawMpi
from espresso_ds.planner.build import make_plan


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A machine with two Ethernet cards, a bridge, an InfiniBand device, two NVIDIA GPUs and an AMD one."""
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE"):
        monkeypatch.delenv(variable, raising=False)

    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text + "\n")

    def card(path, driver):
        (tmp_path / "drivers" / driver).mkdir(parents=True, exist_ok=True)
        (tmp_path / path / "device").mkdir(parents=True)
        (tmp_path / path / "device/driver").symlink_to(tmp_path / "drivers" / driver)

    write("proc/cpuinfo", "processor\t: 0\nmodel name\t: Some  CPU @ 2 GHz\n\nprocessor\t: 1\nmodel name\t: Some  CPU @ 2 GHz")
    write("sys/class/net/lo/type", "772")
    for name, speed in (("eth0", "25000"), ("eth1", "-1")):
        write(f"sys/class/net/{name}/type", "1")
        write(f"sys/class/net/{name}/speed", speed)
        card(f"sys/class/net/{name}", "mlx5_core" if name == "eth0" else "virtio_net")
    write("sys/class/net/br0/type", "1")
    write("sys/class/net/br0/uevent", "DEVTYPE=bridge\nINTERFACE=br0")
    write("sys/class/net/bonding_masters", "")  # a file, not an interface
    write("sys/class/infiniband/mlx5_0/ports/1/rate", "100 Gb/sec (4X EDR)")
    card("sys/class/infiniband/mlx5_0", "mlx5_core")
    for number in (0, 1):
        write(f"proc/driver/nvidia/gpus/0000:0{number}:00.0/information", "Model: \t\t NVIDIA H100 PCIe\nIRQ:   1")
    write("sys/class/kfd/kfd/topology/nodes/0/properties", "simd_count 0\ngfx_target_version 0")
    write("sys/class/kfd/kfd/topology/nodes/1/properties", "simd_count 4\ngfx_target_version 90010")
    write("proc/net/route", "Iface\tDestination\tGateway\tFlags\neth0\t0000000A\t0\t0001\neth1\t00000000\t0100000A\t0003")
    return tmp_path


def test_facts_are_those_of_the_files(root):
    host = this_host("worker", "nccl", root)
    assert (host.name, host.cpu, host.cores) == ("worker", "Some CPU @ 2 GHz", os.cpu_count())
    assert host.gpus == ("NVIDIA H100 PCIe", "NVIDIA H100 PCIe", "AMD gfx 90010")
    found = {nic.name: (nic.driver, nic.bit_per_s) for nic in host.nics}
    assert found == {
        "br0": ("bridge", None),
        "eth0": ("mlx5_core", 25 * 10**9),
        "eth1": ("virtio_net", None),
        "mlx5_0": ("mlx5_core", 100 * 10**9),
    }


@pytest.mark.parametrize(
    ("backend", "variables", "carrier"),
    [
        ("nccl", {}, "mlx5_0"),
        ("nccl", {"NCCL_IB_DISABLE": "1"}, "eth1"),
        ("nccl", {"NCCL_IB_DISABLE": "1", "NCCL_SOCKET_IFNAME": "=eth0"}, "eth0"),
        ("nccl", {"NCCL_IB_DISABLE": "1", "NCCL_SOCKET_IFNAME": "br"}, "br0"),
        ("nccl", {"NCCL_IB_DISABLE": "1", "NCCL_SOCKET_IFNAME": "^docker"}, "eth1"),
        ("gloo", {"GLOO_SOCKET_IFNAME": "eth0,eth1"}, "eth0"),
        ("gloo", {}, "eth1"),
    ],
)
def test_the_interface_that_carries_the_traffic_is_the_backends_own_choice(root, monkeypatch, backend, variables, carrier):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: {"worker": "10.0.0.5"}[name])
    address = [SimpleNamespace(family=socket.AF_INET, address="10.0.0.5")]
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"lo": [], "eth1": address})
    host = this_host("worker", backend, root)
    assert host.nic.name == carrier and sum(nic.carries for nic in host.nics) == 1


def test_this_very_machine_has_cores_and_a_cpu():
    host = this_host(socket.gethostname(), "gloo")
    assert host.cores == os.cpu_count() and host.cpu
    there = {path.name for path in Path("/sys/class/net").glob("*") if path.is_dir()} - {"lo"}
    assert there <= {nic.name for nic in host.nics}


def hosts_of(*names, cores=2, slots=2, speed=10**10, **facts):
    nic = Nic(name="eth0", driver="veth", bit_per_s=speed, carries=True)
    return [Host(name=name, slots=slots, cores=cores, cpu="C", nics=(nic,), **facts) for name in names]


def test_the_kind_of_a_cluster_outlives_names_and_order():
    first = ClusterKind.of("gloo", [*hosts_of("a", "b"), *hosts_of("c", cores=64)])
    other = ClusterKind.of("gloo", [*hosts_of("x", cores=64), *hosts_of("y", "z")])
    assert first == other and first.fingerprint == other.fingerprint and first.differences(other) == []
    assert first.fingerprint != ClusterKind.of("gloo", hosts_of("a", "b", "c")).fingerprint


def test_differences_name_the_fact_and_both_values():
    made = ClusterKind.of("gloo", hosts_of("a", "b"))
    assert made.differences(ClusterKind.of("gloo", hosts_of("a", "b", cores=64))) == ["cores 2 -> 64"]
    mixed = ClusterKind.of("nccl", [*hosts_of("a", gpus=("H100",) * 8, speed=10**9), *hosts_of("b", cores=64)])
    assert made.differences(mixed) == [
        "backend gloo -> nccl",
        "cores 2 -> 1 x 2, 1 x 64",
        "GPUs none -> 1 x 8 x H100, 1 x none",
        "network speed 10 Gbit/s -> 1 x 1 Gbit/s, 1 x 10 Gbit/s",
    ]


def test_what_is_unknown_or_does_not_matter_is_not_compared():
    known, unknown = ClusterKind.of("gloo", hosts_of("a", "b")), ClusterKind.of("gloo", hosts_of("a", "b", speed=None))
    assert known.differences(unknown) == unknown.differences(known) == []
    alone = ClusterKind.of("gloo", hosts_of("a")), ClusterKind.of("gloo", hosts_of("a", speed=10**9))
    assert alone[0] == alone[1], "within one host no card is used"


def digest(value):
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_a_plan_keeps_the_kind_and_older_plans_keep_their_seal():
    plan = plan_for(torch.nn.Linear(2, 2), {})
    content = plan.model_dump(mode="json", exclude={"seal", "step", "pipeline"})
    del content["made_for"]["cluster"]
    assert plan.seal == digest(content), "as sealed before there was such a field"
    kept = plan.model_copy(
        update={"made_for": plan.made_for.model_copy(update={"cluster": ClusterKind.of("gloo", hosts_of("a"))})}
    )
    assert kept.sealed().seal != plan.seal
    assert Plan.from_json(json.loads(kept.sealed().model_dump_json()), "here").made_for.cluster.hosts[0].cores == 2


def test_profiles_from_before_load_and_keep_their_fingerprint():
    new = nested_cluster_of(nodes=2, node=2, alpha_s=(1e-5, 1e-3), bytes_per_s=(25e9, 5e6))
    new = new.model_copy(update={"links": {Level.INTER: Link(alpha_s=1e-3, beta_s_per_byte=1e-8, fit_error=0)}})
    old = new.model_dump(mode="json")
    for key in ("facts", "speeds", "pairs", "mpi", "remarks", "took_s"):
        del old[key]
    for cost in old["routines"]:
        del cost["spread"]
    for key in ("nbytes", "seconds", "spread"):
        del old["links"]["inter"][key]
    assert new.fingerprint == digest(old)
    assert ClusterProfile.from_json(old, "here").kind is None
    for update in ({"facts": tuple(hosts_of("a"))}, {"mpi": RawMpi(library="M", costs=())}, {"remarks": ("slow",)}):
        assert new.model_copy(update=update).fingerprint != new.fingerprint


def test_the_planner_writes_the_kind_into_the_plan():
    codecs = codecs_of(encode=2e-9, decode=1e-9, share=0.02)
    trace, cluster = named_trace(), cluster_of(alpha_s=1e-3, bytes_per_s=25e6)
    assert make_plan(trace, cluster, codecs, made_by="tests").made_for.cluster is None
    facts = tuple(hosts_of(*cluster.hosts, slots=cluster.ranks_per_node))
    plan = make_plan(trace, cluster.model_copy(update={"facts": facts}), codecs, made_by="tests")
    assert plan.made_for.cluster == ClusterKind.of("gloo", facts)
