"""The cluster profiler: its fit, its schedule, its commands, and whole runs over gloo."""

import os
import re
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from espresso_ds.core import progress
from espresso_ds.core.errors import EspressoError, FileError, UnsupportedError
from espresso_ds.core.option import ROUTINES, Level, Task
from espresso_ds.core.profile import ClusterProfile
from espresso_ds.profiler import cluster, mpi_launch, probes, rendezvous
from espresso_ds.profiler.fit import fit_line
from espresso_ds.profiler.measure import Effort, Probe, measure

SIZES = [256 * 4**k for k in range(9)]


@pytest.mark.parametrize(("alpha", "beta"), [(2e-4, 4e-8), (0.0, 1e-9), (5e-3, 0.0)])
def test_fit_recovers_a_line(alpha, beta):
    line = fit_line(SIZES, [alpha + beta * n for n in SIZES])
    np.testing.assert_allclose(line[:2], (alpha, beta), rtol=1e-6, atol=1e-15)
    assert line.fit_error < 1e-9


def test_fit_of_noisy_times_is_near_both_ends():
    alpha, beta = 2e-4, 1 / 24e6
    noise = np.random.default_rng(0).uniform(0.9, 1.1, len(SIZES))
    line = fit_line(SIZES, noise * (alpha + beta * np.array(SIZES)))
    assert line.alpha_s == pytest.approx(alpha, rel=0.25)
    assert line.beta_s_per_byte == pytest.approx(beta, rel=0.12)
    assert 0 < line.fit_error < 0.2


def test_fit_is_not_bent_by_sizes_that_a_shaper_lets_pass():
    times = [2e-4 + n / 24e6 for n in SIZES]
    for index in (2, 3, 4):
        times[index] = 2e-4
    line = fit_line(SIZES, times)
    assert line.beta_s_per_byte == pytest.approx(1 / 24e6, rel=1e-3)
    assert line.alpha_s == pytest.approx(2e-4, rel=0.01)


def test_fit_is_never_negative():
    assert min(fit_line(SIZES, [1e-3 / (1 + k) for k in range(9)])) >= 0  # faster when larger
    assert min(fit_line(SIZES, [1e-9 * n**1.3 for n in SIZES])) >= 0  # a line through two of these cuts below zero


@pytest.mark.parametrize(("nbytes", "seconds"), [([256], [1.0]), ([256, 256], [1.0, 2.0]), ([1, 2], [1.0, 0.0]), ([1, 2], [1.0])])
def test_fit_refuses_what_gives_no_line(nbytes, seconds):
    with pytest.raises(EspressoError, match="no line"):
        fit_line(nbytes, seconds)


class FakeLink:
    """Takes `alpha + beta * nbytes` without waiting, and records what was asked of it."""

    def __init__(self, beta: float):
        self.beta, self.asked = beta, []

    def run(self, nbytes: int, count: int) -> float:
        self.asked.append((nbytes, count))
        return 1e-4 + self.beta * nbytes


def test_sizes_grow_until_the_time_is_long_and_passes_are_interleaved():
    slow, fast = FakeLink(1e-6), FakeLink(1e-9)
    told = []
    effort = Effort(grow_below_s=0.1, row_s=0.01, longest_row=7, budget_s=100.0, passes=(3, 3))
    found = measure(
        [Probe("slow", tuple(SIZES), slow.run), Probe("fast", tuple(SIZES), fast.run)],
        effort,
        list,
        lambda share, what: told.append((share, what)),
    )
    assert list(found[0]) == SIZES[: SIZES.index(262144) + 1], "65536 takes 0.066 s, 262144 takes 0.26 s"
    assert list(found[1]) == SIZES
    assert found[0][1024] == (pytest.approx(1e-4 + 1024e-6), pytest.approx(0.0))
    one_pass = [nbytes for nbytes, _ in slow.asked[-6:]]
    assert one_pass == SIZES[:6] and [nbytes for nbytes, _ in slow.asked[-12:-6]] == one_pass
    assert dict(slow.asked[-6:])[256] == 7 and dict(slow.asked[-6:])[262144] == 1
    shares = [share for share, _ in told]
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_a_probe_of_less_weight_gets_less_time():
    light, heavy = FakeLink(1e-6), FakeLink(1e-6)
    probes_ = [Probe("light", tuple(SIZES), light.run, weight=0.1), Probe("heavy", tuple(SIZES), heavy.run)]
    effort = Effort(grow_below_s=0.1, row_s=0.01, budget_s=100.0, passes=(1, 1))
    found = measure(probes_, effort, list, lambda share, what: None)
    assert list(found[0]) == SIZES[: SIZES.index(16384) + 1], "4096 takes 0.004 s, 16384 takes 0.016 s"
    assert (dict(light.asked)[256], dict(heavy.asked)[256]) == (2, 28)
    assert list(found[1]) == SIZES[: SIZES.index(262144) + 1]


def test_two_sizes_are_measured_however_slow_the_link():
    (found,) = measure([Probe("slow", tuple(SIZES), FakeLink(1.0).run)], Effort(), list, lambda share, what: None)
    assert list(found) == SIZES[:2]


def test_the_slowest_rank_counts():
    (found,) = measure(
        [Probe("x", (1, 2), lambda nbytes, count: 1.0)], Effort(), lambda s: [3 * x for x in s], lambda share, what: None
    )
    assert found == {1: (3.0, 0.0), 2: (3.0, 0.0)}


@pytest.mark.parametrize("world", [1, 2, 3, 64])
@pytest.mark.parametrize("task", sorted(ROUTINES))
def test_sizes_are_rows_of_aligned_floats(task, world):
    sizes = probes.routine_sizes(task, world)
    assert len(sizes) >= 2 and list(sizes) == sorted(set(sizes))
    assert all(nbytes % (16 * world) == 0 for nbytes in sizes)


def test_one_way_takes_the_answer_off():
    assert probes.one_way({64: 2.0, 1024: 5.0, 4096: 1.5}) == {64: 1.0, 1024: 4.0, 4096: 0.75}


def test_layout():
    assert rendezvous.layout(["a", "a", "b", "b"]) == (("a", "b"), 2)
    with pytest.raises(UnsupportedError, match="a: 2, b: 1"):
        rendezvous.layout(["a", "a", "b"])
    with pytest.raises(UnsupportedError, match="alternate"):
        rendezvous.layout(["a", "b", "a", "b"])


def test_gloo_on_loopback_is_a_fault_between_hosts_only(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    fault = rendezvous._gloo_fault()
    assert "GLOO_SOCKET_IFNAME" in fault
    told = [{"host": host, "backend": "gloo", "fault": fault} for host in ("a", "b")]
    with pytest.raises(UnsupportedError, match=r"rank 0 on a: .*GLOO_SOCKET_IFNAME"):
        rendezvous._check(told)
    assert rendezvous._check(told[:1] * 2) == (("a",), 2)


def test_read_hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# ours\nworker-1 slots=2\n\nworker-2  slots=4 # big\n")
    assert mpi_launch.read_hostfile(path) == {"worker-1": 2, "worker-2": 4}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a slots=2\nb\n", r"line 2: 'b'"),
        ("a slots=0", "line 1"),
        ("a slots=1\na slots=1", "line 2.*'a'.*twice"),
        ("#\n", "no host"),
    ],
)
def test_hostfile_faults_name_the_line(tmp_path, text, fault):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(FileError, match=fault):
        mpi_launch.read_hostfile(path)
    with pytest.raises(FileError, match="cannot read this hostfile"):
        mpi_launch.read_hostfile(tmp_path / "none")


def test_mpirun_command(tmp_path, monkeypatch):
    mpirun = tmp_path / "mpirun"
    mpirun.write_text("#!/bin/sh\necho 'mpirun (Open MPI) 5.0.11'\n")
    mpirun.chmod(0o755)
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=2\nb slots=2\n")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("ONE", "1")
    monkeypatch.delenv("TWO", raising=False)
    command = mpi_launch.mpirun_command(hosts, None, ["prog", "arg"], export=["ONE", "TWO"])
    placed = ["--map-by", "slot", "--bind-to", "none"]
    assert command == [str(mpirun), "--hostfile", str(hosts), "-n", "4", *placed, "-x", "ONE", "prog", "arg"]
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    command = mpi_launch.mpirun_command(None, 3, ["prog"])
    assert command == [str(mpirun), "--host", "localhost:3", "-n", "3", *placed, "--allow-run-as-root", "prog"]
    with pytest.raises(UnsupportedError, match="4 slots are too few for 5 ranks"):
        mpi_launch.mpirun_command(hosts, 5, ["prog"])
    mpirun.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match=r"pip install espresso-ds\[mpi\]"):
        mpi_launch.mpirun_command(hosts, None, ["prog"])


def test_progress_lines_are_read_back(capsys):
    progress.print_progress(0.42, "allreduce 4 MiB")
    assert progress.parse_progress(capsys.readouterr().out) == (0.42, "allreduce 4 MiB")
    assert progress.parse_progress("hosts.json: 2 hosts") is None


def test_profile_of_threads_has_all_that_there_is_to_measure(monkeypatch):
    """Two hosts of two ranks: every routine at every level, a link of either kind, and the same file on every rank."""
    monkeypatch.setattr(probes, "_LARGEST", {})
    monkeypatch.setattr(probes, "_LARGEST_OTHER", 1 << 16)
    profiles = profile_in_threads(("a", "b"), 2)
    assert all(profile == profiles[0] for profile in profiles)
    found = {(cost.routine, cost.level, cost.ranks, cost.groups): cost for cost in profiles[0].routines}
    expected = [(Level.FLAT, 4, 1), (Level.INTRA, 2, 1), (Level.INTER, 2, 2), (Level.INTER, 2, 1)]
    assert len(found) == len(profiles[0].routines)
    assert set(found) == {(task, *scope) for task in ROUTINES for scope in expected}
    assert all(len(cost.nbytes) >= 2 for cost in found.values())
    assert len(found[Task.ALLREDUCE, Level.FLAT, 4, 1].nbytes) > len(found[Task.ALLREDUCE, Level.INTRA, 2, 1].nbytes)
    assert set(profiles[0].links) == {Level.INTRA, Level.INTER}


@pytest.mark.parametrize(("hosts", "per_node"), [(("a",), 2), (("a", "b"), 1)])
def test_one_node_or_one_rank_on_each_has_flat_routines_only(monkeypatch, hosts, per_node):
    monkeypatch.setattr(probes, "_LARGEST", {})
    monkeypatch.setattr(probes, "_LARGEST_OTHER", 1 << 12)
    profile = profile_in_threads(hosts, per_node)[0]
    assert {(cost.level, cost.ranks, cost.groups) for cost in profile.routines} == {(Level.FLAT, 2, 1)}


def profile_in_threads(hosts, per_node):
    """Every rank's profile; ranks are threads, and hosts only names."""
    store, world, deadline = dist.HashStore(), len(hosts) * per_node, timedelta(seconds=60)

    def join(ranks, rank, name):
        return dist.ProcessGroupGloo(dist.PrefixStore(name, store), ranks.index(rank), len(ranks), deadline)

    def rank_main(rank):
        group = join(list(range(world)), rank, "all")
        ranks = rendezvous.Ranks(group, rank, "gloo", torch.device("cpu"), hosts, per_node, 60.0)
        levels = {level: join(members, rank, f"{level}{members}") for level, members in ranks.members().items()}
        ranks = replace(ranks, levels=levels)
        profile = cluster.profile_cluster(ranks, Effort(row_s=1e-3, budget_s=0.1), lambda share, what: None)
        return [group, *levels.values()], profile

    with ThreadPoolExecutor(world) as threads:
        done = list(threads.map(rank_main, range(world), timeout=120))
    for groups, _ in done:
        for group in groups:
            group.shutdown()
    return [profile for _, profile in done]


def test_groups_of_a_level_part_the_ranks():
    every = [rendezvous.Ranks(None, rank, "gloo", torch.device("cpu"), ("a", "b", "c"), 2, 1.0) for rank in range(6)]
    assert [ranks.members()[Level.INTRA] for ranks in every] == [[0, 1]] * 2 + [[2, 3]] * 2 + [[4, 5]] * 2
    assert [ranks.members()[Level.INTER] for ranks in every] == [[0, 2, 4], [1, 3, 5]] * 3


def test_coarse_sizes_are_fewer_and_reach_as_far():
    fine, coarse = (probes.routine_sizes(Task.ALLREDUCE, 2, below) for below in (0, probes._COARSE_BELOW))
    assert set(coarse) < set(fine) and (coarse[0], coarse[-1]) == (fine[0], fine[-1])


def start_rank(rank: int, world: int, port: int, *arguments: str) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    env |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "espresso_ds.profiler.cluster", *arguments]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run_ranks(*arguments: list[str]) -> list[subprocess.CompletedProcess]:
    """One process per list of arguments, with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [start_rank(rank, len(arguments), port, *each) for rank, each in enumerate(arguments)]
    try:
        told = [process.communicate(timeout=150) for process in started]
    finally:
        for process in started:
            process.kill()
    return [subprocess.CompletedProcess(p.args, p.returncode, *t) for p, t in zip(started, told, strict=True)]


@pytest.mark.parametrize(
    ("second", "fault"),
    [(["--backend", "nccl"], "rank 0 on .* would use gloo, rank 1 on .* nccl"), ([], "its directory does not exist")],
)
def test_faults_stop_all_ranks_alike(tmp_path, second, fault):
    output = ["-o", str(tmp_path / "none" / "cluster.json"), "--backend", "gloo"]
    for done in run_ranks(output, [*output, *second]):
        assert done.returncode == 1 and re.search(fault, done.stderr), done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("launcher", ["mpirun", "environment"])
def test_whole_run(tmp_path, launcher):
    path = tmp_path / "cluster.json"
    arguments = ["-o", str(path), "--quick", "--backend", "gloo"]
    if launcher == "environment":
        first, second = run_ranks(arguments, arguments)
        assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
        assert second.stdout == "", "only rank 0 speaks"
        out = first.stdout
    else:
        if shutil.which("mpirun") is None and not Path(sys.executable).with_name("mpirun").exists():
            pytest.skip("no mpirun here")
        command = mpi_launch.mpirun_command(None, 2, [sys.executable, "-m", "espresso_ds.profiler.cluster", *arguments])
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
        done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=150)
        assert done.returncode == 0, done.stderr
        out = done.stdout
    profile = ClusterProfile.load(path)
    assert (profile.backend, profile.hosts, profile.ranks_per_node) == ("gloo", (socket.gethostname(),), 2)
    assert set(profile.links) == {Level.INTRA}
    assert {cost.routine for cost in profile.routines} == ROUTINES
    assert (profile.mpi is not None) == (launcher == "mpirun"), "MPI is measured where it started the ranks"
    assert [(host.name, host.slots, host.cores) for host in profile.facts] == [(socket.gethostname(), 2, os.cpu_count())]
    assert (profile.pairs, len(profile.speeds)) == ((), 1)
    for cost in profile.routines:
        assert cost.ranks == 2 and max(cost.nbytes) > 1000 * min(cost.nbytes)
    shown = [told for line in out.splitlines() if (told := progress.parse_progress(line))]
    shares = [share for share, _ in shown]
    assert shares == sorted(shares) and shown[-1] == (1.0, "done")
