"""The guard's decisions as functions of times: never slower, bounded, alike on all ranks, deaf to what lies between steps."""

import itertools
import math
import random

import pytest
from ranks import DEADLINE_S, Ranks

from espresso_ds.core.config import EspressoBlock
from espresso_ds.core.errors import FileError, SyncError
from espresso_ds.core.run_trace import Mark, RunUnit
from espresso_ds.runtime.agree import largest
from espresso_ds.runtime.guard import (
    MARGIN,
    MOST_MIXED,
    MOST_UNCOMPRESSED,
    WARM_UP,
    Guard,
    Sample,
    Way,
    beats,
    figures,
    unpaying,
)
from espresso_ds.runtime.trace import Recorder, holds_s

UNITS = frozenset(range(1, 6))
"""Compressed ones; unit 0 is uncompressed in the plan."""
NO_HOLDS = [0.0] * 6


class World:
    """A run on a clock of its own: what a step takes on each way, in seconds, and what lies between two steps."""

    def __init__(self, synced_s, rest_s=lambda step: 0.1, most=16, gain=1.0, holds=None, share=lambda values: list(values)):
        self.now, self.ways, self.steps = 0.0, [], 0
        self.synced_s, self.rest_s, self.holds = synced_s, rest_s, holds
        self.guard = Guard(UNITS, most, gain, share, self._holds_s, clock=lambda: self.now)

    def _holds_s(self, steps):
        ways = {self.ways[step] for step in steps}
        assert len(ways) == 1
        return NO_HOLDS if self.holds is None else self.holds[ways.pop()]

    def step(self):
        """One step; the way it goes by is told from the units that are to be sent uncompressed."""
        gone = self.guard.uncompressed
        way = {0: Way.PLANNED, len(UNITS): Way.UNCOMPRESSED}.get(len(gone), Way.MIXED)
        self.ways.append(way)
        self.now += self.rest_s(self.steps)
        self.guard.begin()
        self.now += self.synced_s(way, self.steps)
        self.steps += 1
        return self.guard.end()

    def run(self):
        while (outcome := self.step()) is None:
            assert self.steps < 100
        return outcome


HELD = {Way.PLANNED: [0.0, 0.3, 0.01, 0.01, 0.01, 0.01], Way.UNCOMPRESSED: [0.0, 0.01, 0.1, 0.1, 0.1, 0.1]}
"""Unit 1 is the one that does not pay."""


@pytest.mark.parametrize("most", range(8, 25))
@pytest.mark.parametrize("holds", [None, HELD], ids=["no mixture", "mixture"])
def test_without_noise_no_slower_way_is_kept(most, holds):
    rng = random.Random(most)
    for _ in range(100):
        seconds = {way: rng.choice([0.2, 1.0, 5.0]) * rng.uniform(0.8, 1.2) for way in Way}
        world = World(lambda way, step, s=seconds: s[way], most=most, gain=rng.uniform(0.5, 10), holds=holds)
        outcome = world.run()
        kept, tried = outcome.figures[outcome.way], outcome.figures
        assert kept.seconds == pytest.approx(seconds[outcome.way] + 0.1)
        best = min(figure.seconds for figure in tried.values())
        assert kept.seconds <= best / (1 - MARGIN) + 1e-9
        assert outcome.way in tried and {Way.PLANNED, Way.UNCOMPRESSED} <= set(tried) <= set(world.ways)
        assert outcome.step == world.steps == len(world.ways) <= most
        assert world.guard.steps_off_plan == {n for n, way in enumerate(world.ways) if way is not Way.PLANNED}
        assert outcome.dropped == {Way.PLANNED: set(), Way.UNCOMPRESSED: UNITS, Way.MIXED: {1}}[outcome.way]
        assert outcome.dropped == world.guard.uncompressed
        before = world.ways[: world.ways.index(Way.MIXED)] if Way.MIXED in world.ways else world.ways
        assert before.count(Way.UNCOMPRESSED) <= MOST_UNCOMPRESSED and world.ways.count(Way.MIXED) <= MOST_MIXED


def test_one_uncompressed_step_is_enough_where_it_is_as_slow_as_predicted():
    world = World(lambda way, step: 12.0 if way is Way.UNCOMPRESSED else 1.0, gain=10.0)
    assert world.run().way is Way.PLANNED
    assert world.ways.count(Way.UNCOMPRESSED) == 1 and world.steps == 5
    surprised = World(lambda way, step: 12.0 if way is Way.UNCOMPRESSED else 1.0, gain=1.0)
    assert surprised.run().way is Way.PLANNED
    assert 1 < surprised.ways.count(Way.UNCOMPRESSED) < MOST_UNCOMPRESSED


def test_a_cold_start_speaks_against_no_way():
    """The first planned steps and the first uncompressed one take ten times as long as the others."""
    cold = {Way.PLANNED: WARM_UP, Way.UNCOMPRESSED: 1}
    for faster, slower in itertools.permutations(cold):
        seen = []

        def synced_s(way, step, seen=seen, faster=faster):
            seen.append(way)
            return (1.0 if way is faster else 1.3) * (10 if seen.count(way) <= cold[way] else 1)

        outcome = World(synced_s, gain=1.1).run()
        assert outcome.way is faster
        assert outcome.figures[slower].seconds == pytest.approx(1.4)


def test_what_lies_between_steps_does_not_matter():
    """Evaluations and checkpoints, wherever they fall: the same verdict from the same steps, and about the same figures."""
    rng = random.Random(1)
    for _ in range(200):
        seconds = {way: rng.uniform(0.5, 1.5) for way in Way}
        gaps = {rng.randrange(1, 16) for _ in range(3)}
        plain = World(lambda way, step, s=seconds: s[way], holds=HELD)
        disturbed = World(lambda way, step, s=seconds: s[way], lambda step, gaps=gaps: 900.0 if step in gaps else 0.1, holds=HELD)
        quiet, loud = plain.run(), disturbed.run()
        assert quiet.way is loud.way and plain.ways == disturbed.ways
        assert all(loud.figures[way].seconds == pytest.approx(figure.seconds) for way, figure in quiet.figures.items())


@pytest.mark.parametrize(("factor", "kept"), [(1.4, Way.PLANNED), (0.7, Way.UNCOMPRESSED)])
def test_noise_does_not_hide_what_is_plain(factor, kept):
    """Steps that vary by a tenth, and now and then one that takes five times as long."""
    rng = random.Random(2)
    wrong = 0
    for _ in range(300):

        def synced_s(way, step):
            noise = rng.gauss(1, 0.1) * (5 if rng.random() < 0.02 else 1)
            return max(noise, 0.1) * (factor if way is Way.UNCOMPRESSED else 1.0)

        wrong += World(synced_s, gain=1.3).run().way is not kept
    assert wrong < 0.05 * 300


def test_in_doubt_the_plan_stays():
    """Equal but for noise: the plan is rarely dropped."""
    rng = random.Random(3)
    worlds = [World(lambda way, step: max(rng.gauss(1, 0.1), 0.1)) for _ in range(300)]
    assert sum(world.run().way is Way.PLANNED for world in worlds) > 0.75 * 300


def test_a_mixture_is_kept_only_where_it_beats_both():
    for mixed_s, kept in ((0.7, Way.MIXED), (0.95, Way.UNCOMPRESSED), (1.5, Way.UNCOMPRESSED)):
        seconds = {Way.PLANNED: 1.2, Way.UNCOMPRESSED: 0.9, Way.MIXED: mixed_s}
        outcome = World(lambda way, step, s=seconds: s[way], holds=HELD).run()
        assert outcome.way is kept and Way.MIXED in outcome.figures
    mixed = World(lambda way, step: 0.5 if way is Way.MIXED else 1.0, holds=HELD).run()
    assert mixed.text(["a", "b", "c", "d"]).endswith(
        f": 1 of 5 compressed units do not pay and are sent uncompressed from step {mixed.step + 1} on (a, b, c, ...)"
    )


def test_no_mixture_is_tried_where_it_could_be_dear():
    for uncompressed_s, tried in ((1.3, True), (2.0, False)):
        seconds = {Way.PLANNED: 1.0, Way.UNCOMPRESSED: uncompressed_s, Way.MIXED: 0.5}
        world = World(lambda way, step, s=seconds: s[way], holds=HELD)
        assert world.run().way is (Way.MIXED if tried else Way.PLANNED)
        assert (Way.MIXED in world.ways) is tried


def test_what_the_user_hears():
    stays = World(lambda way, step: 0.24 if way is Way.UNCOMPRESSED else 0.18, rest_s=lambda step: 0.0).run()
    assert stays.text() == ("guard: planned 0.180 s, uncompressed 0.240 s a step (medians of 4 and 2 steps): the plan stays")
    dropped = World(lambda way, step: 0.18 if way is Way.UNCOMPRESSED else 0.24, rest_s=lambda step: 0.0).run().text()
    assert "planned 0.240 s, uncompressed 0.180 s a step" in dropped
    assert "the plan does not pay here and is dropped: all goes uncompressed from step 10 on" in dropped


def test_figures_and_comparisons():
    samples = [Sample(Way.PLANNED, s, 0.5) for s in (9.0, 9.0, 1.0, 3.0, 2.0)] + [Sample(Way.UNCOMPRESSED, 4.0, 0.5)]
    found = figures(samples)
    assert found[Way.PLANNED] == (2.5, 1.0, 3) and found[Way.UNCOMPRESSED] == (4.5, 0.0, 1)
    assert figures([*samples, Sample(Way.UNCOMPRESSED, 7.0, 0.5)])[Way.UNCOMPRESSED] == (7.5, 0.0, 1)
    assert figures(samples[:1])[Way.PLANNED] == (9.5, 0.0, 1)
    planned, uncompressed = found[Way.PLANNED], found[Way.UNCOMPRESSED]
    assert beats(planned, uncompressed) and not beats(uncompressed, planned)
    assert not beats(planned, planned._replace(seconds=2.5 * (1 + MARGIN / 2)))


def test_units_that_do_not_pay():
    assert unpaying([0.3, 0.1, 0.1], [0.1, 0.3, 0.1], 1.0) == {0}
    assert unpaying([0.12, 0.1], [0.1, 0.1], 1.0) == frozenset()  # not by enough
    assert unpaying([0.003, 0.1], [0.001, 0.1], 1.0) == frozenset()  # not worth a trial
    assert unpaying([0.3, 0.3], [-1.0, 0.1], 1.0) == {1}  # one is not known
    assert unpaying([-1.0], [0.1], 1.0) == frozenset()


def test_ranks_with_clocks_of_their_own_decide_alike():
    """Three ranks as threads, each with times of its own; the largest go round by gloo, step by step."""
    ranks = Ranks(3)

    def work(rank, group):
        rng = random.Random(rank)
        outcomes = []
        for case in range(20):
            shared = random.Random(case)  # what the ways differ by
            seconds = {way: shared.uniform(0.5, 1.5) for way in Way}
            world = World(
                lambda way, step, s=seconds: s[way] * rng.uniform(0.9, 1.1),
                lambda step: rng.uniform(0.0, 1.0),
                holds={way: [rng.uniform(0, 0.3) for _ in range(6)] for way in Way},
                share=lambda values: largest(values, group, DEADLINE_S),
            )
            outcomes.append((world.run(), world.ways))
        return outcomes

    try:
        told = ranks.run(work)
    finally:
        ranks.close()
    assert told[0] == told[1] == told[2]
    assert {outcome.way for outcome, _ in told[0]} >= {Way.PLANNED, Way.UNCOMPRESSED}


def test_the_largest_of_all_ranks_and_a_rank_that_never_comes():
    ranks = Ranks(2)
    try:
        assert ranks.run(lambda rank, group: largest([rank, -rank, 0.1], group, DEADLINE_S)) == [[1.0, 0.0, 0.1]] * 2
        with pytest.raises(SyncError, match="comparing times over all ranks"):
            largest([1.0], ranks.groups[0][0], 0.2)
    finally:
        ranks.close()


def test_how_long_units_hold_up_those_behind_them():
    """Unit 0 is done at 3 s; unit 1, in two chunks, waits for it and takes 2 s; unit 2 is done before and holds up nobody."""
    recorder, second = Recorder(1, 4), 10**9
    for step in range(3):
        at = 100 * step
        for unit, submitted, done in ((0, 1, 3), (1, 2, 4), (2, 2, 5), (3, 2, 2 + step)):
            recorder.training.span(step, unit, Mark.SUBMITTED, (at + submitted) * second, (at + submitted) * second)
            recorder.lane(0).span(step, unit, Mark.DONE, (at + done) * second, (at + done) * second)
        recorder.training.span(step, -1, Mark.FLUSH, (at + 5) * second, (at + 6) * second)
    places = enumerate((0, 1, 1, 2))
    units = [RunUnit(label=str(n), unit=unit, tensors=("t",), numel=1, option="AR.flat", codec=None) for n, unit in places]
    assert holds_s(recorder, units, {1, 2}) == [2.0, 2.0, 0.0]
    assert holds_s(recorder, units, {0}) == [-1.0] * 3  # the first step only sets the clock
    assert all(map(math.isfinite, holds_s(recorder, units, {2})))


def test_settings():
    block = EspressoBlock.read({}, "ds.json").guard
    assert block.enabled and block.steps == 16
    with pytest.raises(FileError, match=r"guard\.steps"):
        EspressoBlock.read({"guard": {"steps": 3}}, "ds.json")
    with pytest.raises(FileError, match="did you mean 'steps'"):
        EspressoBlock.read({"guard": {"step": 9}}, "ds.json")
