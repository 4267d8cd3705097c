"""Plans in which no change of one choice helps, by hand: what each further step is there for, and that it does it.

Link and codecs run at such rates that times come out as round numbers; latencies are next to nothing.
"""

import itertools
from dataclasses import replace

import pytest
from planner_cases import cluster_of, codecs_of, several, small_menu, trace_of

from espresso_ds.planner.anneal import anneal
from espresso_ds.planner.chunk import SIZES, cut_into_chunks
from espresso_ds.planner.fuse import fuse
from espresso_ds.planner.improve import descend, exchange, exchange_three, kick, polish
from espresso_ds.planner.limits import Limits
from espresso_ds.planner.recut import recut
from espresso_ds.planner.timeline import Unit, iteration_time
from espresso_ds.planner.trials import Trials

N = 2**20
AT_ONCE = 1e-6  # seconds of backward
SENT, GATHERED = "AR.flat", "C.cpu AG.flat D.cpu"
FREE, SMALL = 1e-12, 1e-4  # seconds per element; share of the bytes
CLOSE = {"abs": 1e-3}


def link_of(seconds, numel=N):
    """A cluster of two whose allreduce of `numel` elements takes so long."""
    return cluster_of(world=2, bytes_per_s=4 * numel / seconds)


def units_of(trace, menu, *choices):
    return [Unit.of(trace, place, place + 1, *menu.choices[choice]) for place, choice in enumerate(choices)]


def changed(units, trace, menu, count):
    """F(S) of all plans that differ in the choices of so many units or fewer."""
    for places in itertools.combinations(range(len(units)), count):
        for choices in itertools.product(menu.choices, repeat=count):
            plan = list(units)
            for place, (option, codec) in zip(places, choices, strict=True):
                plan[place] = replace(plan[place], option=option, codec=codec)
            yield iteration_time(plan, trace, menu.costs)


def descended(units, trace, menu, limits, movable=False):
    """Trials on which the steps that change one choice at a time have been, in vain."""
    trials = Trials(units, trace, menu, movable)
    descend(trials, menu, limits)
    polish(trials, menu, limits)
    assert trials.units == units
    return trials


def test_exchange_changes_two_units_of_which_each_alone_waits_for_the_other():
    """The first decodes for 1 s on the CPU, the second takes 1 s on the link. Both have another codec with which it is 0.8 s."""
    slow, quicker = (codecs_of(encode=FREE, decode=seconds / 2 / N, share=SMALL) for seconds in (1.0, 0.8))
    wide = codecs_of(encode=FREE, decode=FREE, share=0.8)
    trace = trace_of([(N, AT_ONCE), (N, AT_ONCE)])
    menu = small_menu(trace, link_of(1.0), several(slow, quicker, wide), [SENT, GATHERED])
    units, limits = units_of(trace, menu, 1, 0), Limits(trace, menu)
    assert min(changed(units, trace, menu, 1)) == pytest.approx(1.0, **CLOSE)
    trials = descended(units, trace, menu, limits)
    assert exchange(trials, menu, limits)
    assert iteration_time(trials.units, trace, menu.costs) == pytest.approx(0.8, **CLOSE)
    assert [unit.codec for unit in trials.units] == [1, 2]
    assert not exchange(trials, menu, limits), "it is the best of all plans"
    assert trials.time == pytest.approx(min(changed(units, trace, menu, 2)), rel=1e-12)


def kicked():
    """1.2 s: two units of 0.6 s each on the link, while a third decodes for 1 s; the other way around it takes 1 s.

    The large one has to go to the link and both small ones to the CPU, where a codec encodes each in 0.4 s; two of these three
    changes make it 1.4 s or more.
    """
    large, small = 10 * 2**18, 6 * 2**18
    decodes = codecs_of(encode=FREE, decode=1.0 / 2 / large, share=SMALL)
    encodes = codecs_of(encode=0.4 / small, decode=FREE, share=SMALL)
    trace = trace_of([(large, AT_ONCE), (small, AT_ONCE), (small, AT_ONCE)])
    menu = small_menu(trace, link_of(1.0, large), several(decodes, encodes), [SENT, GATHERED])
    return trace, menu, units_of(trace, menu, 1, 0, 0)


def test_a_kick_leads_over_a_barrier_of_two_changes():
    trace, menu, units = kicked()
    limits = Limits(trace, menu)
    assert iteration_time(units, trace, menu.costs) == pytest.approx(1.2, **CLOSE)
    assert min(changed(units, trace, menu, 2)) == pytest.approx(1.2, **CLOSE)
    trials = descended(units, trace, menu, limits)
    assert not exchange(trials, menu, limits)
    assert kick(trials, menu, limits, tries=10)
    assert iteration_time(trials.units, trace, menu.costs) == pytest.approx(1.0, **CLOSE)
    assert trials.time == pytest.approx(min(changed(units, trace, menu, 3)), rel=1e-12)


def test_three_units_are_changed_at_once_where_that_alone_gains():
    trace, menu, units = kicked()
    limits = Limits(trace, menu)
    trials = descended(units, trace, menu, limits)
    assert exchange_three(trials, menu, limits)
    assert iteration_time(trials.units, trace, menu.costs) == pytest.approx(1.0, **CLOSE)
    assert not exchange_three(trials, menu, limits)


def test_no_kick_is_tried_where_none_is_asked_for():
    trace, menu, units = kicked()
    trials = Trials(units, trace, menu)
    assert not kick(trials, menu, Limits(trace, menu), tries=0)
    assert trials.units == units


def test_under_a_budget_for_one_of_two_units_the_better_one_is_compressed():
    """Of two units, sent in 0.5 s and 1 s, the memory of residuals is enough for either but not for both."""
    trace = trace_of([(N // 2, AT_ONCE), (N, AT_ONCE)])
    menu = small_menu(trace, link_of(1.0), codecs_of(encode=FREE, decode=FREE, share=SMALL), [SENT, GATHERED])
    limits, units = Limits(trace, menu, residual_bytes=4 * N), units_of(trace, menu, 1, 0)
    trials = descended(units, trace, menu, limits)
    assert trials.time == pytest.approx(1.0, **CLOSE)
    assert exchange(trials, menu, limits)
    assert trials.time == pytest.approx(0.5, **CLOSE)
    assert [unit.option.compresses for unit in trials.units] == [False, True]


SOON = [(N // 10, 0.1), (N, 0.2), (N // 10, 1.5)]  # 0.1 s, 1 s and 0.1 s on the link


@pytest.mark.parametrize(
    ("runs", "better"), [([(0, 1), (1, 3)], [(0, 2), (2, 3)]), ([(0, 3)], [(0, 2), (2, 3)])], ids=["moved", "split"]
)
def test_recut_frees_what_is_ready_early_from_what_is_ready_late(runs, better):
    """There is one choice only, and fusing cannot help: the second tensor must not wait for the third."""
    trace = trace_of(SOON)
    menu = small_menu(trace, link_of(1.0), codecs_of(), [SENT])
    limits, units = Limits(trace, menu), [Unit.of(trace, *run) for run in runs]
    trials = descended(units, trace, menu, limits, movable=True)
    assert trials.time == pytest.approx(2.7 if len(runs) == 1 else 2.6, **CLOSE)
    assert recut(trials, trace, menu, limits)
    assert [(unit.start, unit.stop) for unit in trials.units] == better
    assert iteration_time(trials.units, trace, menu.costs) == pytest.approx(1.6, **CLOSE)
    assert not recut(trials, trace, menu, limits)


def every_cut(count):
    for inside in range(count):
        for edges in itertools.combinations(range(1, count), inside):
            yield list(itertools.pairwise((0, *edges, count)))


def test_annealing_moves_two_boundaries_at_once():
    """3.7 s in two units; 3.3 s in three others. Whatever moves one boundary, splits one unit or merges two makes it no faster.

    Every unit costs a latency of 0.1 s, and the five tensors 0.7, 0.2, 0.8, 0.2 and 0.9 s on the link.
    """
    rows = [(0.7, 0.2), (0.2, 0.7), (0.8, 0.9), (0.2, 1.2), (0.9, 1.7)]
    trace = trace_of([(int(seconds * N), ready) for seconds, ready in rows])
    menu = small_menu(trace, cluster_of(world=2, alpha_s=0.1, bytes_per_s=4 * N), codecs_of(), [SENT])
    limits = Limits(trace, menu)
    units = [Unit.of(trace, 0, 2), Unit.of(trace, 2, 5)]
    trials = descended(units, trace, menu, limits, movable=True)
    assert not recut(trials, trace, menu, limits)
    fuse(trials, limits)
    assert trials.units == units and trials.time == pytest.approx(3.7, **CLOSE)
    found = anneal(units, trace, menu, limits, rounds=200)
    least = min(iteration_time([Unit.of(trace, *run) for run in cut], trace, menu.costs) for cut in every_cut(5))
    assert iteration_time(found, trace, menu.costs) == pytest.approx(least, rel=1e-12)
    assert least == pytest.approx(3.3, **CLOSE)
    assert [(unit.start, unit.stop) for unit in found] == [(0, 1), (1, 3), (3, 5)]
    assert anneal(units, trace, menu, limits, rounds=0) == units


def test_chunks_overlap_what_no_choice_can():
    """Encoding, sending and decoding take 1 s each, one after the other; of two halves 2 s, as the CPU is never idle.

    encode  0 1 . .
    send    . 0 1 .
    decode  . . 0 1    half a second a column
    """
    trace = trace_of([(N, AT_ONCE)])
    menu = small_menu(trace, link_of(4.0), codecs_of(encode=1 / N, decode=1 / 2 / N, share=1 / 4), [SENT, GATHERED])
    units, limits = units_of(trace, menu, 1), Limits(trace, menu)
    assert min(changed(units, trace, menu, 1)) == pytest.approx(3.0, **CLOSE)
    descended(units, trace, menu, limits)
    (found,) = cut_into_chunks(units, trace, menu, limits)
    assert found == replace(units[0], chunk_numel=min(SIZES))
    assert iteration_time([found], trace, menu.costs) == pytest.approx(2.0, **CLOSE)
