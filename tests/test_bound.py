"""The lower bound: below the best of all strategies of small random instances, and tight where it has to be."""

import random
from itertools import combinations, product

import numpy as np
import pytest
from planner_cases import chunked, trace_of

from espresso_ds.core.config import Constraints
from espresso_ds.core.option import Device, Option
from espresso_ds.core.profile import ClusterProfile, CompressorProfile
from espresso_ds.planner.bound import lower_bound
from espresso_ds.planner.cost import Costs
from espresso_ds.planner.floors import Floors
from espresso_ds.planner.menu import Choice, Menu
from espresso_ds.planner.play import play
from espresso_ds.planner.timeline import Unit, iteration_time
from espresso_ds.planner.tree import allowed, option_tree
from espresso_ds.planner.trials import Trials

pytestmark = pytest.mark.timeout(300)

SIZES = tuple(2**power for power in range(8, 29, 4))
TRAFFIC = {"AR": 2.0, "RS": 1.0, "AG": 4.0, "A2A": 1.0, "RD": 2.0, "GA": 4.0, "BC": 2.0}
"""Bytes through the link over those that one rank puts in; roughly, as the bound must hold whatever they are."""


def cluster_of(rng, nodes, node, contention=0.0, noise=0.0):
    """Routines of every level with random bandwidths, latencies and, where `noise` is not 0, dips in their curves."""
    rows = []

    def add(level, ranks, groups, alpha_s, bytes_per_s):
        for name, factor in TRAFFIC.items():
            beta = factor * rng.uniform(0.7, 1.3) * groups / bytes_per_s
            seconds = [(alpha_s + beta * size) * rng.uniform(1 - noise, 1 + noise) for size in SIZES]
            row = {"routine": name, "level": level, "ranks": ranks, "groups": groups, "nbytes": SIZES, "seconds": seconds}
            rows.append({**row, "alpha_s": alpha_s, "beta_s_per_byte": beta, "fit_error": 0.0})

    slow, fast = 10 ** rng.uniform(7.5, 9.5), 10 ** rng.uniform(8.5, 10.5)
    latency_s = 10 ** rng.uniform(-5, -3)
    add("flat", nodes * node, 1, latency_s, slow)
    if nodes > 1 and node > 1:
        add("intra", node, 1, latency_s / 5, fast)
        for groups in (1, node):
            add("inter", nodes, groups, latency_s, slow)
    hosts = [f"host{i}" for i in range(nodes)]
    return ClusterProfile(backend="gloo", hosts=hosts, ranks_per_node=node, routines=rows, links={}, contention=contention)


def codec_of(rng, devices, contention=0.0, noise=0.0):
    """A codec on some devices, with fixed and proportional times and payloads of 1 to 10% of the elements."""
    share, times = 10 ** rng.uniform(-2, -1), []
    for device in devices:
        fixed_s, encode, decode = 10 ** rng.uniform(-6, -4), 10 ** rng.uniform(-11, -8.5), 10 ** rng.uniform(-11, -8.5)
        jitter = [rng.uniform(1 - noise, 1 + noise) for _ in SIZES]
        times.append(
            {
                "device": device,
                "numel": SIZES,
                "payload_nbytes": [max(8, int(4 * size * share)) for size in SIZES],
                "encode_s": [(fixed_s + encode * size) * factor for size, factor in zip(SIZES, jitter, strict=True)],
                "decode_s": [(fixed_s + decode * size) * factor for size, factor in zip(SIZES, jitter, strict=True)],
                "contention": contention if device == "cpu" else 0.0,
            }
        )
    codec = {"compressor": {"name": "topk", "density": 0.01}, "summable": False, "relative_error": 0.5, "devices": times}
    return CompressorProfile(codecs=[codec])


def instance(seed, tensors=None, most=9):
    """A trace of 2 to 4 tensors and a menu of a few random choices, one of them uncompressed."""
    rng = random.Random(seed)
    nodes, node = rng.choice([(2, 1), (4, 1), (2, 2), (3, 2), (2, 4), (1, 4)])
    devices = rng.choice([("cpu",), ("gpu",), ("gpu", "cpu")])
    ready, rows = 0.0, []
    for _ in range(tensors or rng.choice([2, 3, 3, 4])):
        ready += 10 ** rng.uniform(-4, -1.5)
        rows.append((int(2 ** rng.uniform(8, 24)), ready))
    trace = trace_of(
        rows, world=nodes * node, node=node, forward_s=0.003, after_s=0.001, backward_s=ready + rng.choice([0.0, 0.002])
    )
    noise = rng.choice([0.0, 0.0, 0.3])
    cluster = cluster_of(rng, nodes, node, rng.choice([0.0, 0.0, 0.3, 1.5]), noise)
    codecs = codec_of(rng, devices, rng.choice([0.0, 0.4, 1.0, 2.5]), noise)
    costs = Costs(cluster, codecs)
    options = allowed(option_tree(tuple(map(Device, devices))), Constraints(), nodes, node)
    plain = [option for option in options if not option.compresses]
    lossy = [option for option in options if option.compresses]
    chosen = [rng.choice(plain), *rng.sample(lossy, min(len(lossy), rng.randint(1, most - 1)))]
    return trace, Menu([Choice(option) for option in chosen], costs), rng


def cuts(tensors):
    """Every way to cut a sequence into runs (start, stop)."""
    for count in range(tensors):
        for inner in combinations(range(1, tensors), count):
            yield list(zip((0, *inner), (*inner, tensors), strict=True))


def optimum(trace, menu, exact=()):
    """The least F(S) of all cuts and choices, without chunks."""
    best = float("inf")
    for runs in cuts(len(trace.tensors)):
        units = [Unit.of(trace, start, stop, *menu.choices[menu.uncompressed[0]]) for start, stop in runs]
        trials = Trials(units, trace, menu)
        of_unit = [
            menu.uncompressed.tolist() if any(place in exact for place in range(*run)) else range(len(menu.choices))
            for run in runs
        ]
        for choices in product(*of_unit):
            best = min(best, trials.time_with_all(list(enumerate(choices))))
    return best


def chunked_times(trace, menu, rng, count=40):
    """F(S) of random strategies in chunks."""
    every = list(cuts(len(trace.tensors)))
    for _ in range(count):
        units = [Unit.of(trace, start, stop, *rng.choice(menu.choices)) for start, stop in rng.choice(every)]
        size = int(max(unit.numel for unit in units) / rng.uniform(1, 20)) + 1
        yield iteration_time(chunked(units, size, menu.costs.world), trace, menu.costs)


@pytest.mark.parametrize("part", range(4))
def test_no_strategy_is_faster(part):
    gaps = []
    for seed in range(part * 60, part * 60 + 60):
        trace, menu, rng = instance(seed, most=9 if seed % 2 else 5)
        if len(trace.tensors) == 4 and len(menu.choices) > 6:
            menu = Menu(menu.choices[:6], menu.costs)
        bound = lower_bound(trace, menu).seconds
        best = optimum(trace, menu)
        assert trace.compute_s <= bound <= best * (1 + 1e-9), seed
        assert bound <= lower_bound(trace, menu, best).seconds * (1 + 1e-4), seed
        assert lower_bound(trace, menu, best).seconds <= best, seed
        fastest = min(chunked_times(trace, menu, rng))
        assert bound <= fastest * (1 + 1e-9), seed
        gaps.append(min(best, fastest) / bound - 1)
    assert np.median(gaps) < 0.1


def test_a_known_plan_never_makes_it_wrong():
    for seed in range(300, 340):
        trace, menu, rng = instance(seed, tensors=3, most=6)
        best = min(optimum(trace, menu), *chunked_times(trace, menu, rng))
        for slack in (1.0, 1.01, 1.2):
            assert lower_bound(trace, menu, best * slack).seconds <= best * (1 + 1e-9), (seed, slack)


def test_exact_tensors():
    for seed in range(400, 430):
        trace, menu, rng = instance(seed, tensors=3, most=6)
        exact = {rng.randrange(3)}
        bound = lower_bound(trace, menu, exact=exact).seconds
        assert bound >= lower_bound(trace, menu).seconds * (1 - 2e-4), seed
        assert bound <= optimum(trace, menu, exact) * (1 + 1e-9), seed


def test_more_choices_never_raise_it():
    for seed in range(500, 530):
        trace, menu, _ = instance(seed)
        fewer = Menu(menu.choices[: (len(menu.choices) + 1) // 2], menu.costs)
        assert lower_bound(trace, menu).seconds <= lower_bound(trace, fewer).seconds * (1 + 2e-4), seed


def test_one_uncompressed_tensor_is_exact():
    for seed in range(600, 640):
        trace, menu, _ = instance(seed, tensors=1)
        plain = Menu([menu.choices[place] for place in menu.uncompressed], menu.costs)
        if menu.costs.link_contention == 0:
            assert lower_bound(trace, plain).seconds == pytest.approx(optimum(trace, plain), rel=1e-6), seed


def test_one_tensor_whose_codec_costs_the_same_at_any_size():
    rng = random.Random(1)
    times = {"numel": SIZES, "payload_nbytes": [max(1, size // 4000) for size in SIZES], "contention": 0.0}
    times |= {"encode_s": [0.01] * len(SIZES), "decode_s": [0.01] * len(SIZES), "device": "gpu"}
    codec = {"compressor": {"name": "topk", "density": 0.01}, "summable": False, "relative_error": 0.5, "devices": [times]}
    costs = Costs(cluster_of(rng, 2, 1), CompressorProfile(codecs=[codec]))
    menu = Menu([Choice(Option.parse(text)) for text in ("AR.flat", "C.gpu AG.flat D.gpu")], costs)
    trace = trace_of([(2**28, 0.5)], device="cuda")
    assert sum(s for _, s in menu.walk(1, 2**28).lean) < sum(s for _, s in menu.walk(0, 2**28).lean)
    assert lower_bound(trace, menu).seconds == pytest.approx(optimum(trace, menu), rel=1e-6)


@pytest.mark.parametrize("count", [1, 30, 3000])
def test_a_saturated_link_is_exact(count):
    """Ready at once and sent without latency, whatever the cut: the link's work is all there is."""
    rng = random.Random(2)
    cluster = cluster_of(rng, 2, 1)
    routines = [
        row.model_copy(update={"alpha_s": 0.0, "seconds": tuple(1e-8 * size for size in row.nbytes), "beta_s_per_byte": 1e-8})
        for row in cluster.routines
    ]
    cluster = cluster.model_copy(update={"routines": tuple(routines)})
    menu = Menu([Choice(Option.parse("AR.flat"))], Costs(cluster, codec_of(rng, ["cpu"])))
    trace = trace_of([(rng.randint(1, 10**6), 1e-3) for _ in range(count)])
    time = Trials([Unit.of(trace, i, i + 1) for i in range(count)], trace, menu).time
    assert lower_bound(trace, menu).seconds == pytest.approx(time, rel=1e-6)
    assert lower_bound(trace, menu).limit.startswith(("links between nodes", "the way of"))


def test_where_backward_hides_everything_it_is_backward():
    trace, menu, _ = instance(3)
    slow = trace.model_copy(update={"backward_s": 1e3})
    found = lower_bound(slow, menu)
    time = Trials([Unit.of(slow, 0, len(slow.tensors), *menu.choices[menu.uncompressed[0]])], slow, menu).time
    assert found.seconds == pytest.approx(time, rel=1e-9)
    assert found.seconds == pytest.approx(slow.compute_s, rel=1e-9)


def test_what_the_bound_does_not_see():
    """Two tensors, of a second each on the link and ready a second apart, and a second of latency per buffer.

    Sent apart they take two latencies, 1 + 2 + 2; sent together they wait for the later one, 2 + 3. The bound counts one latency
    and no wait: 1 + 3. So a gap can be the bound's fault alone.
    """
    routines = [
        row.model_copy(update={"alpha_s": 1.0, "seconds": tuple(1 + size / 2**22 for size in SIZES), "beta_s_per_byte": 2**-22})
        for row in cluster_of(random.Random(4), 2, 1).routines
    ]
    cluster = cluster_of(random.Random(4), 2, 1).model_copy(update={"routines": tuple(routines)})
    menu = Menu([Choice(Option.parse("AR.flat"))], Costs(cluster, codec_of(random.Random(4), ["cpu"])))
    trace = trace_of([(2**20, 1.0), (2**20, 2.0)])
    assert optimum(trace, menu) == pytest.approx(5.0)
    assert lower_bound(trace, menu).seconds == pytest.approx(4.0)


def test_ways_hold_for_any_larger_unit_and_any_chunks():
    for seed in range(700, 760):
        _, menu, rng = instance(seed)
        numel = int(2 ** rng.uniform(8, 20))
        floors = Floors(menu, 8 * numel)
        ways = floors.ways(numel, menu.everything)
        for choice, size in product(range(len(menu.choices)), (numel, int(numel * rng.uniform(1, 8)))):
            trace = trace_of([(size, 0.0)], backward_s=1e-9)
            unit = Unit.of(trace, 0, 1, *menu.choices[choice])
            whole = menu.walk(choice, size)
            for place in range(4):
                work = sum(seconds for resource, seconds in whole.lean if resource == place)
                assert floors.rates[choice, place] * size <= work * (1 + 1e-9)
            for pieces in (*range(1, 9), 16, 17, 40):
                units = chunked([unit], -(-size // pieces), menu.costs.world)
                time = iteration_time(units, trace, menu.costs)
                assert ways[choice] <= time * (1 + 1e-9), (seed, choice, size, pieces)


def test_the_timeline_keeps_to_the_lemmas():
    """Random units on the four resources: the inequalities of bound.py, with every step's seconds known."""
    for seed in range(3000):
        rng = random.Random(seed)
        slowed, link_slowed = rng.choice([0.0, 0.3, 1.0, 2.5]), rng.choice([0.0, 0.2, 1.5])
        resources = rng.choice([(1, 3), (0, 1), (0, 1, 3), (1, 2, 3), (0, 1, 2, 3)])
        units = rng.randint(1, 4)
        walks = [[(rng.choice(resources), rng.uniform(0.0, 1.5)) for _ in range(rng.randint(1, 4))] for _ in range(units)]
        ready = sorted(rng.uniform(0.0, 3.0) for _ in range(units))
        backward_s = ready[-1] + rng.choice([0.0, 1.0])
        time = max(play(walks, ready, backward_s, slowed, link_slowed)) * (1 + 1e-12)
        work = np.zeros((units, 4))
        for unit, walk in enumerate(walks):
            for resource, seconds in walk:
                work[unit, resource] += seconds
        codec, cpu, *links = work.sum(axis=0)
        share = min(1.0, slowed)
        used = sum(load > 0 for load in links)
        delay = link_slowed / (1 + used * link_slowed)
        assert time >= backward_s + codec
        assert time >= backward_s + (1 - share) * codec + share * cpu, seed
        assert time >= backward_s + (1 - used * delay) * codec + delay * sum(links), seed
        for unit in range(units):
            later = work[unit:].sum(axis=0)
            assert time >= ready[unit] + later[1] + share * (backward_s - ready[unit]) * (later[1] > 0), seed
            assert time >= ready[unit] + later[1:].max(), seed
