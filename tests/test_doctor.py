"""What `espresso doctor` says about the network and MPI of this host."""

import socket

import psutil
import pytest

from espresso_ds.commands import doctor
from espresso_ds.core.hosts import Host, Nic
from espresso_ds.profiler.mpi_find import Launcher


@pytest.fixture(autouse=True)
def named(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: "here")


@pytest.mark.parametrize(("address", "good"), [("10.0.0.7", True), ("127.0.1.1", False)])
def test_a_name_that_is_loopback_is_no_good_to_gloo(monkeypatch, address, good):
    monkeypatch.setattr(socket, "gethostbyname", lambda name: address)
    found, text = doctor.host_name()
    assert found is good and text.startswith(f"here is {address}")
    assert ("GLOO_SOCKET_IFNAME" in text) is not good


def test_a_name_without_address(monkeypatch):
    def fail(name):
        raise socket.gaierror("unknown")

    monkeypatch.setattr(socket, "gethostbyname", fail)
    assert doctor.host_name() == (False, doctor.host_name()[1]) and "here has no address (unknown)" in doctor.host_name()[1]


def test_the_interface_that_gloo_is_told_to_take_must_be_there(monkeypatch):
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth7": []})
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert doctor.host_name()[0]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth8")
    assert doctor.host_name() == (False, "GLOO_SOCKET_IFNAME=eth8: no interface 'eth8' here; there are eth7")


def test_network_cards(monkeypatch):
    nics = (Nic(name="eth0", driver="mlx5_core", bit_per_s=25 * 10**9, carries=True), Nic(name="eth1", driver="virtio_net"))
    monkeypatch.setattr(doctor, "this_host", lambda name, backend: Host(name=name, slots=1, cores=2, cpu="x", nics=nics))
    assert doctor.network() == (True, "eth0 (mlx5_core at 25 Gbit/s), gloo takes it; eth1 (virtio_net)")
    monkeypatch.setattr(doctor, "this_host", lambda name, backend: Host(name=name, slots=1, cores=2, cpu="x"))
    assert doctor.network() == (False, "no interface but loopback: one host only")


@pytest.mark.parametrize(
    ("version", "kind", "good"),
    [
        ("Open MPI v5.0.11, package: x\n", "openmpi", True),
        ("Open MPI v5.0.11, package: x\n", "mpich", False),
        ("MPICH Version:      4.3.0\nMPICH Release date: x\n", "mpich", True),
        ("MPICH Version:      4.3.0\n", "openmpi", False),
    ],
)
def test_library_and_mpirun_of_different_mpis_are_told(monkeypatch, version, kind, good):
    MPI = pytest.importorskip("mpi4py.MPI")
    monkeypatch.setattr(MPI, "Get_library_version", lambda: version)
    monkeypatch.setattr(doctor, "find_launcher", lambda: Launcher(kind, "/bin/mpirun"))
    found, text = doctor.mpi_library()
    assert found is good and " ".join(version.split()[:2]).rstrip(",") in text
    assert ("MPI4PY_LIBMPI" in text) is not good
