"""Models of routines over nodes x GPUs, against messages counted one by one, and profiles rescaled by them."""

import math
from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from planner_cases import cluster_of

from espresso_ds.core.errors import FileError
from espresso_ds.core.option import ROUTINES, Level, Task
from espresso_ds.core.profile import Link
from espresso_ds.planner.routine_models import layouts, nominal_cluster, rescaled
from espresso_ds.planner.routine_traffic import UNEVEN, Layout, rounds, traffic

INTRA = Link(alpha_s=2e-5, beta_s_per_byte=8 / 100e9, fit_error=0.0)
INTER = Link(alpha_s=1.5e-4, beta_s_per_byte=8 / 25e9, fit_error=0.0)
SHAPES = [(n, m) for n in (1, 2, 3, 4) for m in (1, 2, 3, 4) if n * m > 1]


def ring(p, times):
    """`times` rounds of p - 1 steps in which every rank sends one block to the next rank."""
    return [(r, (r + 1) % p) for _ in range(times * (p - 1)) for r in range(p)]


def messages(task, p):
    """(sender, receiver) of every message, and the share of what one rank puts in that a message holds."""
    return {
        Task.ALLREDUCE: (ring(p, 2), 1 / p),
        Task.REDUCE_SCATTER: (ring(p, 1), 1 / p),
        Task.ALLGATHER: (ring(p, 1), 1),
        Task.ALLTOALL: ([(a, b) for a in range(p) for b in range(p) if a != b], 1 / p),
        Task.REDUCE: ([(r, r - 1) for r in range(1, p)], 1),
        Task.BROADCAST: ([(r, r + 1) for r in range(p - 1)], 1),
        Task.GATHER: ([(r, 0) for r in range(1, p)], 1),
    }[task]


def busiest(sent, node_of):
    """Most messages through a node's card and through a rank's link inside its node, of either direction."""
    nic, gpu = Counter(), Counter()
    for a, b in sent:
        ends, count = ((a, b), gpu) if node_of[a] == node_of[b] else ((node_of[a], node_of[b]), nic)
        count["out", ends[0]] += 1
        count["in", ends[1]] += 1
    return max(nic.values(), default=0), max(gpu.values(), default=0)


@pytest.mark.parametrize("task", sorted(ROUTINES))
@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_traffic_of_one_group_is_what_its_messages_carry(task, n, m):
    sent, share = messages(task, n * m)
    nic, gpu = busiest(sent, [rank // m for rank in range(n * m)])
    assert traffic(task, Layout(n, m)) == pytest.approx((nic * share, gpu * share))


@pytest.mark.parametrize("task", sorted(ROUTINES - {Task.BROADCAST}))
@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_traffic_over_gloo_is_what_its_messages_carry(task, n, m):
    """A reduce-scatter is an alltoall; a reduce is a ring of shards, then a gather of them."""
    p = n * m
    sent, share = messages(Task.ALLTOALL if task is Task.REDUCE_SCATTER else task, p)
    phases = [sent]
    if task is Task.REDUCE:  # one after the other
        phases, share = [ring(p, 1), [(r, 0) for r in range(1, p)]], 1 / p
    node_of = [rank // m for rank in range(p)]
    nic, gpu = (share * sum(most) for most in zip(*(busiest(phase, node_of) for phase in phases), strict=True))
    if n > 2 and task in (Task.ALLTOALL, Task.REDUCE_SCATTER):
        nic *= UNEVEN
    assert traffic(task, Layout(n, m), "gloo") == pytest.approx((nic, gpu))


@pytest.mark.parametrize("p", range(2, 40))
def test_a_broadcast_over_gloo_ends_when_a_fluid_simulation_ends(p):
    """Whole messages down a binomial tree; what a rank sends at once shares its card, what it receives is one message."""
    left, sender, done = {}, {}, {0: 0.0}

    def starts(rank):
        for bit in range(16):  # in step `bit` whoever has a lower number than 2^bit gives to the one 2^bit further
            if rank < 1 << bit and rank + (1 << bit) < p:
                left[rank + (1 << bit)], sender[rank + (1 << bit)] = 1.0, rank

    now = 0.0
    starts(0)
    while left:
        sending = Counter(sender[rank] for rank in left)
        step = min(left[rank] * sending[sender[rank]] for rank in left)
        now += step
        for rank in list(left):
            left[rank] -= step / sending[sender[rank]]
        for rank in [rank for rank in left if left[rank] < 1e-9]:
            del left[rank]
            done[rank] = now
            starts(rank)
    assert len(done) == p
    assert traffic(Task.BROADCAST, Layout(p, 1), "gloo").nic == pytest.approx(now)
    assert traffic(Task.BROADCAST, Layout(p, 3, groups=2), "gloo").nic == pytest.approx(6 * now)
    assert traffic(Task.BROADCAST, Layout(1, p), "gloo") == (0, pytest.approx(now))


@pytest.mark.parametrize("task", sorted(ROUTINES))
@pytest.mark.parametrize(("n", "g"), [(2, 2), (2, 4), (3, 2), (4, 3)])
def test_groups_at_once_share_the_cards(task, n, g):
    """g groups of one rank per node, as messages of the whole cluster at once."""
    sent, share = messages(task, n)
    everywhere = [(a * g + local, b * g + local) for a, b in sent for local in range(g)]
    nic, gpu = busiest(everywhere, [rank // g for rank in range(n * g)])
    assert traffic(task, Layout(n, 1, groups=g)) == pytest.approx((nic * share, gpu * share))


def test_nominal_costs_by_hand():
    """8 x 8 GPUs: an allreduce of 1 GiB is limited by the cards; on four times faster ones by the GPUs' links."""
    cost = costs(nominal_cluster(8, 8, INTRA, INTER))[Task.ALLREDUCE, Level.FLAT, 64, 1]
    assert cost.seconds[-1] == pytest.approx(1.5e-4 + 2 * 63 / 64 * 2**30 * 8 / 25e9)
    fast = Link(alpha_s=1.5e-4, beta_s_per_byte=8 / 200e9, fit_error=0.0)
    cost = costs(nominal_cluster(8, 8, INTRA, fast))[Task.ALLREDUCE, Level.FLAT, 64, 1]
    assert cost.beta_s_per_byte == pytest.approx(2 * 63 / 64 * 8 / 100e9)


def test_hierarchical_allreduce_sends_less_through_the_cards_than_flat_alltoall():
    """A reduce-scatter inside nodes leaves 1/g of the bytes to each of g inter groups: N nodes then send 2 (N-1)/N in all."""
    found = costs(nominal_cluster(4, 8, INTRA, INTER))
    shard = found[Task.ALLREDUCE, Level.INTER, 4, 8].beta_s_per_byte / 8
    assert shard == pytest.approx(2 * 3 / 4 * INTER.beta_s_per_byte)
    assert shard < found[Task.ALLTOALL, Level.FLAT, 32, 1].beta_s_per_byte


def test_what_a_profile_holds():
    found = [(level, layout.ranks, layout.groups) for level, layout in layouts(4, 8)]
    assert found == [(Level.FLAT, 32, 1), (Level.INTRA, 8, 1), (Level.INTER, 4, 8), (Level.INTER, 4, 1)]
    for shape in ((1, 8), (8, 1), (1, 1)):
        assert [level for level, _ in layouts(*shape)] == [Level.FLAT]
    assert {cost.level for cost in nominal_cluster(1, 8, INTRA, INTER).routines} == {Level.FLAT}
    assert set(nominal_cluster(1, 8, INTRA, INTER).links) == {Level.INTRA}
    assert set(nominal_cluster(8, 1, INTRA, INTER).links) == {Level.INTER}


def costs(cluster):
    return {(c.routine, c.level, c.ranks, c.groups): c for c in cluster.routines}


@st.composite
def measured(draw):
    """A profile as measured: nominal routines, each skewed and each time disturbed, some below the fitted alpha."""
    nodes, local = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    cluster = nominal_cluster(nodes, local, INTRA, INTER, backend="gloo")
    noise = st.floats(0.3, 3.0)
    return cluster.model_copy(
        update={
            "contention": 0.3,
            "routines": tuple(
                cost.model_copy(update={"seconds": tuple(s * draw(noise) for s in cost.seconds), "fit_error": 0.1})
                for cost in cluster.routines
            ),
        }
    )


@given(measured())
def test_nothing_changed_is_the_same_profile(cluster):
    assert rescaled(cluster) == cluster
    assert rescaled(cluster, nodes=cluster.nodes, ranks_per_node=cluster.ranks_per_node, inter_speed=1, intra_speed=1) == cluster


@given(measured(), st.integers(2, 9), st.floats(0.01, 100))
def test_rescaled_profiles_are_sound_files(cluster, nodes, speed):
    assume(cluster.nodes > 1)
    changed = rescaled(cluster, nodes=nodes, inter_speed=speed)
    assert type(changed).from_json(changed.model_dump(mode="json"), "x") == changed
    assert changed.nodes == nodes == len(set(changed.hosts)) and changed.ranks_per_node == cluster.ranks_per_node
    expected = {Level.FLAT: nodes * cluster.ranks_per_node, Level.INTRA: cluster.ranks_per_node, Level.INTER: nodes}
    assert all(cost.ranks == expected[cost.level] for cost in changed.routines)


@pytest.mark.parametrize("shape", [(2, 1), (2, 4), (8, 8), (4096, 8)])
@pytest.mark.parametrize(
    "change", [{"nodes": 3}, {"nodes": 1000}, {"inter_speed": 4.0}, {"inter_speed": 0.01, "intra_speed": 2.0}]
)
def test_rescaling_a_nominal_cluster_gives_the_other_nominal_cluster(shape, change):
    """Bandwidths as built anew, alphas by the rounds: the model is consistent with itself."""
    before = nominal_cluster(*shape, INTRA, INTER)
    fast_intra = INTRA.model_copy(update={"beta_s_per_byte": INTRA.beta_s_per_byte / change.get("intra_speed", 1.0)})
    fast_inter = INTER.model_copy(update={"beta_s_per_byte": INTER.beta_s_per_byte / change.get("inter_speed", 1.0)})
    after = costs(nominal_cluster(change.get("nodes", shape[0]), shape[1], fast_intra, fast_inter))
    found = costs(rescaled(before, **change))
    assert found.keys() == after.keys()
    for key, cost in found.items():
        was = INTRA.alpha_s if cost.level is Level.INTRA else INTER.alpha_s
        ranks = {Level.FLAT: shape[0] * shape[1], Level.INTER: shape[0], Level.INTRA: shape[1]}[cost.level]
        assert cost.alpha_s == pytest.approx(was * math.log2(cost.ranks) / max(1, math.log2(ranks)))
        assert cost.beta_s_per_byte == pytest.approx(after[key].beta_s_per_byte)
        for nbytes, seconds in zip(cost.nbytes, cost.seconds, strict=True):
            assert seconds == pytest.approx(cost.alpha_s + cost.beta_s_per_byte * nbytes)


@given(measured(), st.sampled_from([1 / 64, 1 / 3, 1, 5, 100]), st.integers(1, 300))
def test_more_bandwidth_is_never_slower_and_more_nodes_never_faster(cluster, speed, more):
    """But for flat routines that links inside nodes limit and of whose rows the fewer stay inside, the more nodes there are."""
    assume(cluster.nodes > 1)
    base, faster = rescaled(cluster, inter_speed=speed), rescaled(cluster, inter_speed=2 * speed)
    larger = rescaled(cluster, inter_speed=speed, nodes=cluster.nodes + more)
    for one, other in ((faster, base), (base, larger)):
        for quick, slow in zip(one.routines, other.routines, strict=True):
            pairwise = quick.routine in (Task.ALLTOALL, Task.REDUCE_SCATTER, Task.REDUCE)  # the last two by rows over gloo
            if other is larger and pairwise and quick.level is Level.FLAT and speed > 1:
                continue
            assert all(q <= s * (1 + 1e-12) for q, s in zip(quick.seconds, slow.seconds, strict=True))


def test_intra_routines_do_not_care_about_the_network():
    cluster = nominal_cluster(4, 4, INTRA, INTER)
    changed = rescaled(cluster, nodes=64, inter_speed=0.1)
    inside = [cost for cost in cluster.routines if cost.level is Level.INTRA]
    assert [cost for cost in changed.routines if cost.level is Level.INTRA] == inside


def test_the_slower_of_two_links_sets_the_flat_time():
    """Cards made ever faster: the flat allreduce ends at what the GPUs' links allow."""
    cluster = nominal_cluster(8, 8, INTRA, INTER)
    flat = costs(rescaled(cluster, inter_speed=1000.0))[Task.ALLREDUCE, Level.FLAT, 64, 1]
    assert flat.beta_s_per_byte == pytest.approx(2 * 63 / 64 * INTRA.beta_s_per_byte)


def test_one_node_and_one_rank():
    cluster = nominal_cluster(4, 2, INTRA, INTER)
    one = rescaled(cluster, nodes=1)
    assert {(cost.level, cost.ranks) for cost in one.routines} == {(Level.FLAT, 2)} and set(one.links) == {Level.INTRA}
    alone = rescaled(cluster, nodes=1, ranks_per_node=1)
    assert all(cost.beta_s_per_byte == 0 and max(cost.seconds) <= cost.alpha_s + 1e-9 for cost in alone.routines)
    assert {cost.level for cost in rescaled(cluster, ranks_per_node=1).routines} == {Level.FLAT}


@pytest.mark.parametrize("shape", [(1, 4), (1, 1)])
def test_one_node_says_nothing_about_a_network(shape):
    with pytest.raises(FileError, match=r"no inter link was measured.*two nodes"):
        rescaled(nominal_cluster(*shape, INTRA, INTER), nodes=2)


def test_without_links_two_kinds_of_link_cannot_be_told_apart():
    with pytest.raises(FileError, match="no inter link was measured"):
        rescaled(cluster_of(world=16, node=8, alpha_s=1e-4), nodes=4)
    assert rescaled(cluster_of(world=16, node=8)) == cluster_of(world=16, node=8)
    slower = rescaled(cluster_of(world=16, node=1, alpha_s=1e-4), inter_speed=0.5)
    assert slower.routines[0].beta_s_per_byte == pytest.approx(2 * cluster_of(world=16).routines[0].beta_s_per_byte)


@pytest.mark.parametrize(
    "change", [{"nodes": 0}, {"ranks_per_node": -1}, {"inter_speed": 0.0}, {"intra_speed": math.nan}, {"inter_speed": math.inf}]
)
def test_senseless_changes_are_named(change):
    with pytest.raises(FileError, match=next(iter(change))):
        rescaled(nominal_cluster(2, 2, INTRA, INTER), **change)


@pytest.mark.parametrize("task", sorted(ROUTINES))
def test_rounds_are_logarithmic(task):
    once = rounds(task, 2)
    assert [rounds(task, p) / once for p in (1, 2, 4, 1024)] == [1, 1, 2, 10]


def test_rounds_over_gloo_are_messages_one_after_another():
    """A ring's steps by walking round it; everything else by what one rank sends and receives in turn."""
    for p in (2, 3, 4, 8, 1024):
        found = {task: rounds(task, p, "gloo") for task in ROUTINES}
        assert found[Task.ALLGATHER] == len(ring(p, 1)) / p and found[Task.ALLREDUCE] == len(ring(p, 2)) / p
        assert found[Task.ALLTOALL] == found[Task.REDUCE_SCATTER] == p - 1
        assert found[Task.REDUCE] == len(ring(p, 1)) / p + (p - 1)
        assert found[Task.GATHER] == 2 * (p - 1) / p  # p - 1 messages that leave one rank and reach another, p ranks
        assert 2 ** (found[Task.BROADCAST] - 1) < p <= 2 ** found[Task.BROADCAST]
    assert {rounds(task, 1, "gloo") for task in ROUTINES} == {1, 2}  # allreduce counts twice, as over other backends


def test_on_one_node_nothing_waits_for_the_network():
    one = costs(rescaled(nominal_cluster(8, 8, INTRA, INTER), nodes=1))[Task.ALLGATHER, Level.FLAT, 8, 1]
    assert one.alpha_s == pytest.approx(INTRA.alpha_s * 3 / 6)
