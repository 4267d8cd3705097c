"""The whole search against brute force, and never worse than what the paper publishes."""

import itertools
import random
from dataclasses import replace

import pytest
from planner_cases import codecs_of, flat_options, menu_of, random_case, random_nested_case, several, small_menu

from espresso_ds.core.config import Constraints
from espresso_ds.core.option import Device
from espresso_ds.planner import chunk
from espresso_ds.planner.decide import algorithm_1
from espresso_ds.planner.fuse import buckets, partitions, singles
from espresso_ds.planner.limits import Limits
from espresso_ds.planner.offload import algorithm_2
from espresso_ds.planner.search import best_plan, best_uncompressed, least_loaded, published
from espresso_ds.planner.timeline import Unit, iteration_time
from espresso_ds.planner.trials import Trials

MAKERS = [random_case, random_nested_case]
NESTED = [
    "AR.flat",
    "C.cpu AG.flat D.cpu",
    "RS.intra AR.inter AG.intra",
    "RS.intra C.cpu AG.inter D.cpu AG.intra",
    "RS.intra C.cpu AG.inter AG.intra D.cpu",
    "RS.intra C.cpu A2A.inter D.cpu C.cpu AG.inter D.cpu AG.intra",
    "RS.intra C.cpu A2A.inter AG.inter AG.intra D.cpu",
    "RD.intra C.cpu AG.inter D.cpu BC.intra",
    "C.cpu A2A.intra D.cpu AR.inter AG.intra",
    "C.cpu A2A.intra AG.inter AG.intra D.cpu",
]


def paper(trace, menu):
    """Algorithms 1 and 2 from the best uniform uncompressed start, over every choice on the tensor's own device."""
    starts = (singles(trace, menu.choices[choice]) for choice in menu.uncompressed.tolist())
    start = min(starts, key=lambda units: iteration_time(units, trace, menu.costs))
    return algorithm_2(algorithm_1(start, menu.on_device, trace, menu, Limits(trace, menu)), menu).time


def runs_of(count):
    """Every way to cut so many tensors into runs of neighbours."""
    for cuts in itertools.product([False, True], repeat=count - 1):
        edges = [0, *(place + 1 for place, cut in enumerate(cuts) if cut), count]
        yield list(itertools.pairwise(edges))


def brute_force(trace, menu, fused):
    """The least F(S) over every choice of every unit, and over every way to fuse tensors."""
    least = float("inf")
    for runs in runs_of(len(trace.tensors)) if fused else [[(i, i + 1) for i in range(len(trace.tensors))]]:
        trials = Trials([Unit.of(trace, start, stop) for start, stop in runs], trace, menu)
        for plan in itertools.product(range(len(menu.choices)), repeat=len(runs)):
            time = trials.time_with_all(list(enumerate(plan)), least)
            least = min(least, time)
    return least


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("make_case", "options"), [(random_case, flat_options([Device.CPU])), (random_nested_case, NESTED)])
def test_plans_are_mostly_the_best_there_is(make_case, options, fused, monkeypatch):
    """Three tensors. A thousand such instances are in the benchmarks; here few, with room for chance."""
    monkeypatch.setattr(chunk, "SIZES", ())  # brute force cuts nothing
    rng, optimal, close, rounds = random.Random(1), 0, 0, 100
    for number in range(rounds):
        case = make_case(rng, tensors=3, equal=number % 3 == 0)
        trace, menu = case[0], small_menu(*case, options)
        best = brute_force(trace, menu, fused)
        found = iteration_time(best_plan(trace, menu, fused=fused), trace, menu.costs)
        assert found >= best * (1 - 1e-9), "brute force tries all"
        optimal += found <= best * (1 + 1e-9)
        close += found <= best * 1.01
    assert optimal / rounds >= 0.9
    assert close / rounds >= 0.95


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("make_case", MAKERS)
def test_never_worse_than_the_paper(make_case, device):
    rng, better = random.Random(2), 0
    constraints = Constraints(max_compressions=1) if device == "cuda" else Constraints()
    for number in range(50):
        case = make_case(rng, tensors=rng.randint(1, 7), equal=number % 4 == 0, device=device)
        trace, menu = case[0], menu_of(*case, constraints)
        theirs = paper(trace, menu)
        assert published(trace, menu, Limits(trace, menu)).time == pytest.approx(theirs, rel=1e-9)
        for fused in (False, True):
            units = best_plan(trace, menu, fused=fused)
            mine = iteration_time(units, trace, menu.costs)
            assert mine <= theirs * (1 + 1e-9)
            assert mine >= trace.compute_s
            assert [i for unit in units for i in range(unit.start, unit.stop)] == list(range(len(trace.tensors)))
            assert fused or len(units) == len(trace.tensors)
            whole = [replace(unit, chunk_numel=None) for unit in units]
            assert whole == [Unit.of(trace, u.start, u.stop, u.option, u.codec) for u in units]
        better += mine < theirs * (1 - 1e-6)
    assert better > 0


def test_the_same_case_gives_the_same_plan():
    rng = random.Random(3)
    for make_case in MAKERS:
        for _ in range(5):
            case = make_case(rng, tensors=8)
            plans = [best_plan(case[0], menu_of(*case)) for _ in range(2)]
            assert plans[0] == plans[1]


def test_progress_says_what_is_tried():
    case = random_case(random.Random(4), tensors=8)
    seen = []
    best_plan(case[0], menu_of(*case), progress=lambda *told: seen.append(told))
    assert [done for _, done, _ in seen] == list(range(len(seen)))
    assert all(done < total for _, done, total in seen) and len({total for *_, total in seen}) == 1
    assert len(seen) > 1 and all("units" in stage for stage, *_ in seen)


def test_uncompressed_plans_are_better_than_every_bucket_size_of_one_kind():
    rng = random.Random(5)
    for make_case in MAKERS:
        for _ in range(10):
            case = make_case(rng, tensors=10)
            trace, menu = case[0], menu_of(*case)
            units = best_uncompressed(trace, menu)
            assert not any(unit.option.compresses for unit in units)
            found = iteration_time(units, trace, menu.costs)
            alone = (singles(trace, menu.choices[c]) for c in menu.uncompressed.tolist())
            assert found <= min(iteration_time(each, trace, menu.costs) for each in alone) * (1 + 1e-9)


def test_fusing_changes_nothing_that_units_may_not_be():
    """Units of tensors of two dtypes and of exact and other ones stay apart."""
    rng = random.Random(6)
    for _ in range(10):
        trace, cluster, codecs = random_case(rng, tensors=10)
        tensors = tuple(t.model_copy(update={"dtype": rng.choice(["float32", "bfloat16"])}) for t in trace.tensors)
        trace = trace.model_copy(update={"tensors": tensors})
        menu = menu_of(trace, cluster, codecs)
        exact = frozenset(rng.sample(range(10), 3))
        for unit in best_plan(trace, menu, Limits(trace, menu, exact)):
            places = range(unit.start, unit.stop)
            assert len({trace.tensors[i].dtype for i in places}) == 1
            assert not (unit.option.compresses and exact & set(places))


def test_buckets_close_once_they_are_full():
    trace, _, _ = random_case(random.Random(7), tensors=30)
    sizes = [tensor.numel for tensor in trace.tensors]
    for numel in (1, 2**14, 2**18, 2**30):
        runs = buckets(trace, numel)
        assert [i for start, stop in runs for i in range(start, stop)] == list(range(30))
        for start, stop in runs[:-1]:
            assert sum(sizes[start:stop]) >= numel > sum(sizes[start : stop - 1])
    assert buckets(trace, 1) == [(i, i + 1) for i in range(30)]
    assert buckets(trace, 2**30) == [(0, 30)]
    found = [runs for group in partitions(trace) for runs in group]
    assert len(found) == len({tuple(runs) for runs in found}) > 3
    assert all([i for start, stop in runs for i in range(start, stop)] == list(range(30)) for runs in found)


def test_least_loaded_is_least_by_the_definition():
    rng = random.Random(8)
    for make_case in MAKERS:
        for _ in range(4):
            case = make_case(rng, tensors=5)
            trace, menu = case[0], menu_of(*case)
            whole = Unit.of(trace, 0, 5)

            def busiest(choice, whole=whole, trace=trace, menu=menu):
                load = [trace.backward_s, 0.0, 0.0, 0.0]
                for resource, seconds in menu.walk(choice, whole.numel).lean:
                    load[resource] += seconds
                return max(load)

            found = least_loaded(trace, menu, 4)
            lossy = [choice for choice in found if menu.choices[choice].option.compresses]
            plain = [choice for choice in found if choice not in lossy]
            assert found == plain + lossy and plain and lossy
            assert busiest(plain[0]) == pytest.approx(min(map(busiest, menu.uncompressed.tolist())), rel=1e-12)
            every = [c for c in range(len(menu.choices)) if menu.choices[c].option.compresses]
            assert busiest(lossy[0]) <= min(map(busiest, every)) * (1 + 2e-3)
            assert [busiest(c) for c in lossy] == sorted(busiest(c) for c in lossy)


def test_two_codecs_are_as_good_as_the_better_and_both_are_used():
    """One codec is quick and weak, the other slow and strong."""
    rng, both_used = random.Random(9), 0
    for _ in range(30):
        trace, cluster, _ = random_case(rng, tensors=6)
        quick = codecs_of(encode=1e-10, decode=1e-10, share=1 / 4, fixed_s=1e-5)
        strong = codecs_of(encode=10 ** rng.uniform(-9.5, -8), decode=1e-9, share=1 / 100, fixed_s=1e-5)
        plans = {}
        for name, codecs in (("quick", quick), ("strong", strong), ("both", several(quick, strong))):
            menu = menu_of(trace, cluster, codecs)
            plans[name] = best_plan(trace, menu)
        assert trace.compute_s <= (both := iteration_time(plans["both"], trace, menu.costs))
        alone = [
            Trials(plans[name], trace, menu_of(trace, cluster, each)).time
            for name, each in (("quick", quick), ("strong", strong))
        ]
        assert both <= min(alone) * 1.01
        both_used += {unit.codec for unit in plans["both"] if unit.option.compresses} == {0, 1}
    assert both_used > 3
