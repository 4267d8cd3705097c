"""Algorithm 2 against every way to offload there is."""

import itertools
import random
from dataclasses import replace

import pytest
from planner_cases import random_case, random_nested_case, small_menu

from espresso_ds.core.option import Option
from espresso_ds.planner import offload
from espresso_ds.planner.fuse import singles
from espresso_ds.planner.offload import algorithm_2, groups, offloaded
from espresso_ds.planner.timeline import iteration_time
from espresso_ds.planner.trials import Trials

FLAT = ["AR.flat", *(f"C.{d} AG.flat D.{d}" for d in ("gpu", "cpu")), *(f"C.{d} A2A.flat D.{d} AG.flat" for d in ("gpu", "cpu"))]
NESTED = ["RS.intra AR.inter AG.intra", *(f"RS.intra C.{d} AG.inter D.{d} AG.intra" for d in ("gpu", "cpu"))]


def compressed_case(rng, tensors=6, make_case=random_case, options=FLAT):
    """Tensors of two sizes, most of them compressed on the GPU; in half of the cases the CPU is much faster."""
    trace, cluster, codecs = make_case(rng, tensors=tensors, device="cuda")
    sizes = [rng.choice([2**14, 2**20]) for _ in trace.tensors]
    rows = [t.model_copy(update={"numel": n, "shape": (n,)}) for t, n in zip(trace.tensors, sizes, strict=True)]
    trace = trace.model_copy(update={"tensors": tuple(rows)})
    menu = small_menu(trace, cluster, codecs, options)
    on_gpu = [Option.parse(text) for text in options if "cpu" not in text]
    units = [replace(unit, option=rng.choice(on_gpu)) for unit in singles(trace)]
    return units, trace, menu


def offload_last(units, counts):
    """The paper's form: of the units of each size and option the last so many go to the CPU."""
    left, found = dict(counts), []
    for unit in reversed(units):
        key = unit.numel, unit.option
        if left.get(key, 0) > 0:
            left[key] -= 1
            unit = replace(unit, option=offloaded(unit.option))
        found.append(unit)
    return found[::-1]


def paper_sets(units):
    found = {}
    for unit in units:
        if unit.option.compresses:
            key = unit.numel, unit.option
            found[key] = found.get(key, 0) + 1
    return found


def least_of_lemma_1(units, trace, costs):
    sets = paper_sets(units)
    ways = itertools.product(*(range(count + 1) for count in sets.values()))
    return min(iteration_time(offload_last(units, dict(zip(sets, way, strict=True))), trace, costs) for way in ways)


def least_of_all(units, trace, costs):
    places = [place for place, unit in enumerate(units) if unit.option.compresses]
    times = []
    for way in itertools.product([False, True], repeat=len(places)):
        moved = {place for place, offload in zip(places, way, strict=True) if offload}
        plan = [replace(u, option=offloaded(u.option)) if place in moved else u for place, u in enumerate(units)]
        times.append(iteration_time(plan, trace, costs))
    return min(times)


def test_offloaded_moves_every_codec_task_and_nothing_else():
    text = "RS.intra C.gpu A2A.inter D.cpu C.gpu AG.inter D.gpu AG.intra"
    assert str(offloaded(Option.parse(text))) == text.replace("gpu", "cpu")
    assert offloaded(Option.parse("AR.flat")) == Option.parse("AR.flat")


@pytest.mark.parametrize(("make_case", "options"), [(random_case, FLAT), (random_nested_case, NESTED)])
def test_it_finds_the_best_of_the_papers_combinations(make_case, options):
    """And mostly the best of all 2^k ways to offload k tensors, which is Lemma 1."""
    rng, optimal, gained, rounds = random.Random(1), 0, 0, 40
    for _ in range(rounds):
        units, trace, menu = compressed_case(rng, make_case=make_case, options=options)
        before = iteration_time(units, trace, menu.costs)
        trials = algorithm_2(Trials(units, trace, menu), menu)
        found = iteration_time(trials.units, trace, menu.costs)
        assert trials.time == pytest.approx(found, rel=1e-12)
        assert found == pytest.approx(least_of_lemma_1(units, trace, menu.costs), rel=1e-8)
        assert found <= before * (1 + 1e-12)
        everything = least_of_all(units, trace, menu.costs)
        assert everything <= found * (1 + 1e-12)
        optimal += found <= everything * (1 + 1e-9)
        gained += found < before * (1 - 1e-6)
    assert gained > rounds / 4
    assert optimal / rounds >= 0.8


def test_groups_are_of_one_size_and_option_and_begin_with_the_last():
    rng = random.Random(2)
    for _ in range(20):
        units, trace, menu = compressed_case(rng, tensors=9)
        found = groups(Trials(units, trace, menu), menu)
        keys = [(units[members[0][0]].numel, units[members[0][0]].option) for members in found]
        assert {key: len(members) for key, members in zip(keys, found, strict=True)} == paper_sets(units)
        for (numel, option), members in zip(keys, found, strict=True):
            places = [place for place, _ in members]
            assert places == sorted(places, reverse=True)
            assert all((units[place].numel, units[place].option) == (numel, option) for place in places)
            assert all(menu.choices[on_cpu].option == offloaded(option) for _, on_cpu in members)


def test_nothing_is_done_where_nothing_can_be_offloaded():
    rng = random.Random(3)
    units, trace, menu = compressed_case(rng)
    on_cpu = [replace(unit, option=offloaded(unit.option)) for unit in units]
    assert algorithm_2(Trials(on_cpu, trace, menu), menu).units == on_cpu
    plain = [replace(unit, option=Option.parse("AR.flat")) for unit in units]
    assert algorithm_2(Trials(plain, trace, menu), menu).units == plain


def test_beyond_the_combinations_that_are_tried_it_is_still_never_worse(monkeypatch):
    """One group after the other: mostly as good as all combinations."""
    rng, equal, rounds = random.Random(4), 0, 40
    for _ in range(rounds):
        units, trace, menu = compressed_case(rng, tensors=7)
        best = algorithm_2(Trials(units, trace, menu), menu).time
        with monkeypatch.context() as patch:
            patch.setattr(offload, "MOST", 1)
            found = algorithm_2(Trials(units, trace, menu), menu).time
        assert best * (1 - 1e-8) <= found <= iteration_time(units, trace, menu.costs) * (1 + 1e-12)
        equal += found <= best * (1 + 1e-8)
    assert equal / rounds >= 0.9
