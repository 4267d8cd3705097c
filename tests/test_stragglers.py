"""Who is slow: pairs of hosts and their rounds, what the rates accuse, what a person is told, what is measured again."""

import itertools
import json
import os
import re
import shutil
import sys
from statistics import median_high

import jobs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espresso_ds.core.hosts import ClusterKind, Host
from espresso_ds.core.option import ROUTINES, Level
from espresso_ds.core.profile import ClusterProfile, Link
from espresso_ds.planner.cluster_render import draw_fit, panels
from espresso_ds.profiler.measure import Effort, Probe, measure
from espresso_ds.profiler.pairs import ends_of, host_pairs, rounds_of, slow_against_median, slow_links
from espresso_ds.profiler.remarks import remarks
from espresso_ds.profiler.stragglers import Abilities


@pytest.mark.parametrize("hosts", [1, 2, 3, 8, 9, 64])
def test_pairs_and_rounds(hosts):
    pairs = host_pairs(hosts)
    assert pairs == host_pairs(hosts) and len(set(pairs)) == len(pairs) and all(a < b for a, b in pairs)
    if hosts <= 8:
        assert pairs == list(itertools.combinations(range(hosts), 2))
    else:
        assert len(pairs) == 2 * hosts and all((a, (a + 1) % hosts) in pairs or (0, a) in pairs for a in range(hosts))
    rounds = rounds_of(pairs)
    assert sorted(pair for each in rounds for pair in each) == sorted([*pairs, *((b, a) for a, b in pairs)])
    for each in rounds:
        busy = [host for pair in each for host in pair]
        assert len(busy) == len(set(busy)), "a host sends or receives once in a round"


def rates_of(up, down, links=()):
    """What hosts of these abilities would show: the slower end rules, unless the link itself is slower."""
    slow = dict(links)
    every = [(a, b) for pair in host_pairs(len(up)) for a, b in (pair, pair[::-1])]
    return {(a, b): min(up[a], down[b], slow.get((a, b), 1e18)) for a, b in every}


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 12), st.data())
def test_exactly_the_slow_end_is_accused(hosts, data):
    guilty, verb = data.draw(st.integers(0, hosts - 1)), data.draw(st.sampled_from(["up", "down"]))
    able = {"up": [100.0] * hosts, "down": [100.0] * hosts}
    able[verb][guilty] = data.draw(st.floats(1, 60))
    rates = rates_of(**able)
    ends = ends_of(rates, hosts)
    accused = {side: set(slow_against_median({h: getattr(e, side) for h, e in enumerate(ends)})) for side in ("up", "down")}
    assert accused == {verb: {guilty}, ({"up", "down"} - {verb}).pop(): set()}
    assert slow_links(rates, ends) == {}, "the hosts explain it"


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 8), st.data())
def test_a_slow_link_between_sound_hosts_is_accused_with_its_factor(hosts, data):
    link = data.draw(st.sampled_from([(a, b) for pair in host_pairs(hosts) for a, b in (pair, pair[::-1])]))
    rates = rates_of([100.0] * hosts, [100.0] * hosts, {link: 25.0})
    assert slow_links(rates, ends_of(rates, hosts)) == {link: 4.0}


def test_of_two_hosts_the_slower_direction_is_accused_and_no_host():
    able = Abilities({(0, 1): 100e6, (1, 0): 25e6}, [10.0, 10.0])
    (told,) = remarks(("a", "b"), able, {}, None)
    assert "link b -> a carries 200 Mbit/s, 4.0x less than the other way" in told


def test_factors_below_one_and_a_half_are_nobodys_fault():
    even = {0: 100.0, 1: 70.0, 2: 99.0}
    assert slow_against_median(even) == {} and median_high(even.values()) == 99.0
    able = Abilities(rates_of([100.0, 70.0, 99.0], [100.0] * 3), list(even.values()))
    assert list(remarks(("a", "b", "c"), able, {}, None)) == []


def test_remarks_name_slow_computing_restless_links_and_unlike_hosts():
    hosts = [Host(name=name, slots=1, cores=cores, cpu="C") for name, cores in (("a", 2), ("b", 2), ("c", 64))]
    able = Abilities(rates_of([1e8] * 3, [1e8] * 3), [10.0, 4.0, 10.0])
    restless = Link(alpha_s=0, beta_s_per_byte=1e-8, fit_error=0, nbytes=(64, 10**6), seconds=(1e-4, 1e-2), spread=(0.0, 0.4))
    told = list(remarks(("a", "b", "c"), able, {Level.INTER: restless}, ClusterKind.of("gloo", hosts)))
    assert len(told) == 3
    assert "RESTLESS: the inter link's bandwidth spreads by 40%" in told[0]
    assert told[1].startswith("b computes 2.5x slower")
    assert "cores: 2 x 2, 1 x 64" in told[2]


class Restless:
    """Takes 1 s, but for the calls numbered in `late`."""

    def __init__(self, late):
        self.late, self.calls = late, 0

    def run(self, nbytes, count):
        self.calls += 1
        return 10.0 if self.calls in self.late else 1.0


@pytest.mark.parametrize(
    ("late", "again", "spread"),
    [
        ((), 0, 0.0),
        ((6,), 1, None),  # of the smaller size: its samples are calls 5, 7 and 9 after two sizes were found by two calls each
        (range(5, 100, 2), 0, 0.0),  # always late is no outlier, but how it is
    ],
)
def test_what_is_far_off_is_measured_again_and_kept(late, again, spread):
    quiet, restless = Restless(()), Restless(late)
    effort = Effort(grow_below_s=0.5, budget_s=1e9, passes=(3, 3), again=3)
    found = measure([Probe("quiet", (1, 2), quiet.run), Probe("restless", (1, 2), restless.run)], effort, list, lambda *_: None)
    assert quiet.calls == 4 + 2 * 3
    assert restless.calls == 4 + 2 * 3 + again
    assert all(timing.seconds in (1.0, 10.0) for timing in found[1].values())
    if spread is not None:
        assert [timing.spread for timing in found[1].values()] == [spread, spread]


def test_measuring_again_is_bounded_in_number_and_in_time():
    for budget_s, most in ((1e9, 3), (10.0, 1)):  # a fifth of 10 s is enough for both sizes once
        jumpy = itertools.chain([1.0] * 4, (4.0**n for n in itertools.count()))
        calls = []
        probe = Probe("jumpy", (1, 2), lambda nbytes, count, jumpy=jumpy, calls=calls: calls.append(nbytes) or next(jumpy))
        measure([probe], Effort(grow_below_s=0.5, budget_s=budget_s, passes=(3, 3)), list, lambda *_: None)
        assert len(calls) == 4 + 2 * 3 + 2 * most


def test_spread_is_the_interquartile_range_over_the_median():
    times = iter([1.0, 1.0, 1.0, 1.0, 1.0, 1.1, 1.2, 1.3, 1.4, 0.9])
    probe = Probe("x", (1, 2), lambda nbytes, count: next(times))
    (found,) = measure([probe], Effort(grow_below_s=0.5, budget_s=1e9, passes=(3, 3)), list, lambda *_: None)
    for samples, timing in zip(([1.0, 1.2, 1.4], [1.1, 1.3, 0.9]), found.values(), strict=True):
        low, high = np.percentile(samples, [25, 75])
        assert timing == (pytest.approx(np.median(samples)), pytest.approx((high - low) / np.median(samples)))


def test_long_rows_are_shortened_to_the_budget():
    asked = []
    probe = Probe("x", (1, 2), lambda nbytes, count: asked.append(count) or 1e-3)
    measure([probe], Effort(row_s=0.04, budget_s=0.06, passes=(3, 3)), list, lambda *_: None)
    assert asked[2:] == [10] * 6, "two sizes, three passes, 1 ms each: 60 ms in all"


@pytest.mark.slow
def test_an_emulated_host_with_a_slow_uplink_is_named(tmp_path):
    """Three hosts of two ranks, one of which may send at a fifth of the others' rate; raw MPI, facts and picture with it."""
    mpirun = shutil.which("mpirun", path=str(jobs.BIN))
    slow = f"ssh host2 {shutil.which('tc', path=os.environ['PATH'] + ':/usr/sbin:/sbin')} qdisc replace dev eth0 root tbf "
    slow += "rate 100mbit burst 80000 latency 100ms"
    rank = f"{sys.executable} -m espresso_ds.profiler.cluster -o cluster.json --quick --backend gloo"
    start = f"{mpirun} --hostfile {{hostfile}} -n 6 --map-by slot --bind-to none -x PYTHONPATH {rank}"
    emulate = [sys.executable, jobs.ROOT / "launch" / "emulate", "--hosts", 3, "--slots", 2, "--rate", "500mbit", "--"]
    done = jobs.run([*emulate, "sh", "-c", f"{slow} && {start}"], cwd=tmp_path, PYTHONPATH=str(jobs.ROOT))
    if done.returncode == 3 or mpirun is None:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout[-4000:]
    profile = ClusterProfile.load(tmp_path / "cluster.json")
    accused = [
        found[0] for remark in profile.remarks if (found := re.findall(r"^\w+ (?:sends|receives)|^the link \w+ -> \w+", remark))
    ]
    assert accused == ["host2 sends"], profile.remarks
    ups = [8 * speed.up_bytes_per_s for speed in profile.speeds]
    assert ups[2] < 110e6 < 300e6 < min(ups[:2]), "what tc allows, and more than that"
    assert {(pair.sender, pair.receiver) for pair in profile.pairs} == {(a, b) for a in range(3) for b in range(3) if a != b}
    assert [(host.name, host.slots, host.nic.name) for host in profile.facts] == [(f"host{n}", 2, "eth0") for n in range(3)]
    assert (profile.kind.nodes, profile.kind.ranks_per_node) == (3, 2)
    levels = [(Level.FLAT, 6, 1), (Level.INTRA, 2, 1), (Level.INTER, 3, 2), (Level.INTER, 3, 1)]
    assert [(cost.level, cost.ranks, cost.groups) for cost in profile.routines] == [each for each in levels for _ in ROUTINES]
    assert {cost.operation for cost in profile.mpi.costs} == {"allreduce", "allgather", "alltoall", "send"}
    assert all(min(cost.seconds) > 0 and len(cost.seconds) >= 2 for cost in profile.mpi.costs)
    assert "Open MPI" in profile.mpi.library
    draw_fit(profile, tmp_path / "fit.png")
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")
    drawn = panels(profile)
    assert len(drawn) == 5 and sum(series.line is None for series in drawn["links"]) == 1
    shown = jobs.run([jobs.BIN / "espresso", "profile", "show", "cluster.json", "--picture"], cwd=tmp_path)
    assert shown.returncode == 0 and "host2 sends" in shown.stdout and "drawn: cluster.png" in shown.stdout
    assert profile.kind.fingerprint in shown.stdout
    assert json.loads((tmp_path / "cluster.json").read_text())["took_s"] > 0
