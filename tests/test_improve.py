"""The steps that improve a plan: none makes it slower or breaks a limit, and each gains where the others are stuck."""

import itertools
import random
from dataclasses import dataclass, replace

import pytest
from planner_cases import menu_of, random_case, random_nested_case, residual_bytes, several, small_menu

from espresso_ds.core.config import Constraints
from espresso_ds.core.profile import ModelTrace
from espresso_ds.planner.anneal import anneal
from espresso_ds.planner.chunk import cut_into_chunks
from espresso_ds.planner.fuse import fuse
from espresso_ds.planner.improve import descend, drop_idle, exchange, exchange_three, kick, polish
from espresso_ds.planner.limits import Limits
from espresso_ds.planner.menu import Menu
from espresso_ds.planner.recut import recut
from espresso_ds.planner.thrift import spare
from espresso_ds.planner.timeline import Unit, iteration_time
from espresso_ds.planner.trials import ROUNDING, Trials

ERRORS = (0.6, 0.1)
FEW = ["AR.flat", "C.cpu AG.flat D.cpu", "C.cpu A2A.flat D.cpu C.cpu AG.flat D.cpu"]
ONCE = Constraints(max_compressions=1)
CASES = [(random_case, "cpu"), (random_nested_case, "cpu"), (random_case, "cuda"), (random_nested_case, "cuda")]


@dataclass(frozen=True)
class Case:
    """What may be chosen, what must be kept to, and a plan that keeps to it."""

    trace: ModelTrace
    menu: Menu
    exact: frozenset[int]
    residual_bytes: float | None
    error_budget: float | None
    units: list[Unit]

    @property
    def limits(self) -> Limits:
        return Limits(self.trace, self.menu, self.exact, self.residual_bytes, self.error_budget)

    def seconds(self, units) -> float:
        """F(S) by the reference in Python, which is no part of the search."""
        return iteration_time(units, self.trace, self.menu.costs)

    def check(self, units) -> None:
        """Every tensor once and in order, nothing about units made up, all limits kept: counted here, not by `Limits`."""
        assert [place for unit in units for place in range(unit.start, unit.stop)] == list(range(len(self.trace.tensors)))
        for unit in units:
            fresh = Unit.of(self.trace, unit.start, unit.stop, unit.option, unit.codec)
            assert replace(unit, chunk_numel=None) == fresh
        lossy = [unit for unit in units if unit.option.compresses]
        assert not any(self.exact & set(range(unit.start, unit.stop)) for unit in lossy)
        if self.residual_bytes is not None:
            assert sum(residual_bytes(unit, *self.menu.costs.shape) for unit in lossy) <= self.residual_bytes * (1 + 1e-9)
        if self.error_budget is not None:
            lost = sum(ERRORS[unit.codec] * unit.numel for unit in lossy)
            assert lost <= self.error_budget * sum(tensor.numel for tensor in self.trace.tensors) * (1 + 1e-12)


def random_cases(seed, count, limited, most=9, options=None):
    """Two codecs, tensors of two dtypes, and a random plan: any runs of one dtype, any choices that the limits leave."""
    rng = random.Random(seed)
    for make_case, device in CASES:
        for number in range(count):
            trace, cluster, one = make_case(rng, tensors=rng.randint(2, most), equal=number % 3 == 0, device=device)
            dtypes = rng.choice([["float32"], ["float32", "bfloat16"]])
            tensors = tuple(tensor.model_copy(update={"dtype": rng.choice(dtypes)}) for tensor in trace.tensors)
            trace = trace.model_copy(update={"tensors": tensors})
            codecs = several(one, make_case(rng, tensors=1, device=device)[2], errors=ERRORS)
            menu = small_menu(trace, cluster, codecs, options) if options else menu_of(trace, cluster, codecs, ONCE)
            places, total = range(len(tensors)), sum(tensor.numel for tensor in tensors)
            exact = frozenset(rng.sample(places, rng.randint(0, 2))) if limited else frozenset()
            caps = (rng.uniform(0, 1.2 * 4 * total), rng.uniform(0.05, 0.6)) if limited else (None, None)
            case = Case(trace, menu, exact, *caps, random_units(rng, trace))
            trials = Trials(case.units, trace, menu)
            for place in rng.sample(trials.places, len(trials.places)):
                trials.replace(place, int(rng.choice(case.limits.allowed(trials, place, menu.everything))))
            case = replace(case, units=trials.units)
            case.check(case.units)
            yield rng, case


def random_units(rng, trace):
    """Runs of one dtype, all uncompressed."""
    edges = [0]
    for place in range(1, len(trace.tensors)):
        if trace.tensors[place].dtype != trace.tensors[place - 1].dtype or rng.random() < 0.6:
            edges.append(place)
    return [Unit.of(trace, *run) for run in itertools.pairwise([*edges, len(trace.tensors)])]


def in_place(step, movable=False):
    """A step on trials as one from units to units."""

    def run(case, units):
        trials = Trials(units, case.trace, case.menu, movable)
        step(trials, case)
        return trials.units

    return run


STEPS = {
    "descend": in_place(lambda trials, case: descend(trials, case.menu, case.limits)),
    "exchange": in_place(lambda trials, case: exchange(trials, case.menu, case.limits)),
    "kick": in_place(lambda trials, case: kick(trials, case.menu, case.limits, 10)),
    "polish": in_place(lambda trials, case: polish(trials, case.menu, case.limits)),
    "drop_idle": in_place(lambda trials, case: drop_idle(trials, case.menu)),
    "fuse": in_place(lambda trials, case: fuse(trials, case.limits)),
    "recut": in_place(lambda trials, case: recut(trials, case.trace, case.menu, case.limits), movable=True),
    "anneal": lambda case, units: anneal(units, case.trace, case.menu, case.limits, 40, seed=7),
    "chunks": lambda case, units: cut_into_chunks(units, case.trace, case.menu, case.limits),
}


@pytest.mark.parametrize("limited", [False, True], ids=["free", "limited"])
@pytest.mark.parametrize("name", STEPS)
def test_no_step_makes_a_plan_slower_or_breaks_a_limit(name, limited):
    """From random plans and, as steps follow each other, from plans that were descended. Drops and merges may cost ROUNDING."""
    gained = 0
    for rng, case in random_cases(1, 15, limited):
        start = case.units if rng.random() < 0.5 else STEPS["descend"](case, case.units)
        before, rounding = case.seconds(start), 2 * ROUNDING * len(start)
        found = STEPS[name](case, start)
        case.check(found)
        assert case.seconds(found) <= before * (1 + rounding)
        assert STEPS[name](case, start) == found, "the same plan gets the same improvement"
        gained += case.seconds(found) < before * (1 - 1e-6)
    assert gained > 0 or name == "drop_idle"


@pytest.mark.parametrize("limited", [False, True], ids=["free", "limited"])
@pytest.mark.parametrize(
    ("steps", "options"), [((kick, exchange), None), ((exchange_three, kick), FEW)], ids=["whole tree", "few options"]
)
def test_what_steps_say_of_their_gain_is_true(steps, options, limited):
    """One after the other on the same trials, as the search runs them. Triples need a small menu."""
    told = dict.fromkeys(steps, 0)
    for _, case in random_cases(2, 60, limited, most=5, options=options):
        trials = Trials(case.units, case.trace, case.menu)
        if options is None:
            descend(trials, case.menu, case.limits)  # with few options that leaves nothing to gain
        for step in steps:
            before = case.seconds(trials.units)
            gained = step(trials, case.menu, case.limits, *([30] if step is kick else []))
            after = case.seconds(trials.units)
            assert gained == (after < before * (1 - ROUNDING / 2)) and after <= before
            told[step] += gained
            case.check(trials.units)
        assert trials.time == pytest.approx(case.seconds(trials.units), rel=1e-12)
    assert told[steps[0]] and (told[steps[1]] or options), told


def test_a_unit_that_is_held_keeps_its_choice_and_others_change():
    changed = 0
    for rng, case in random_cases(3, 15, limited=False):
        trials = Trials(case.units, case.trace, case.menu)
        held = rng.choice(trials.places)
        before = [trials.choice(place) for place in trials.places]
        descend(trials, case.menu, case.limits, held=held)
        assert trials.choice(held) == before[held]
        changed += [trials.choice(place) for place in trials.places] != before
    assert changed > 10


def test_sparing_stays_below_its_limit_and_loses_less():
    """Of no tensor more than before, and in the end no unit could lose less within the limit."""
    spared = milder = 0
    for rng, case in random_cases(4, 15, limited=True):
        units = STEPS["descend"](case, case.units)
        limit = case.seconds(units) * rng.uniform(0.95, 1.1)
        left = spare(units, case.trace, case.menu, case.limits, limit)
        assert case.seconds(left) <= max(limit, case.seconds(units)) * (1 + 1e-12)
        case.check(left)
        before, after = (
            [loss_of(unit, case.menu) for unit in plan for _ in range(unit.start, unit.stop)] for plan in (units, left)
        )
        assert all(less <= loss for less, loss in zip(after, before, strict=True))
        trials = Trials(left, case.trace, case.menu)
        spared += left != units
        milder += any(0 < less < loss for less, loss in zip(after, before, strict=True))
        for place in trials.places:
            unit = trials.at(place)
            choices = case.limits.allowed(trials, place, case.menu.front(unit.numel)).tolist()
            if unit.option.compresses:
                choices += case.menu.uncompressed.tolist()
            less = [each for each in choices if loss_of(case.menu.choices[each], case.menu) < loss_of(unit, case.menu)]
            assert all(trials.time_with(place, each) > limit for each in less)
    assert spared > 3 and milder > 0


def loss_of(chosen, menu):
    return menu.costs.codecs[chosen.codec].relative_error if chosen.option.compresses else 0.0


def some_in_chunks(rng, units):
    return [
        replace(unit, chunk_numel=-(-unit.numel // rng.randint(1, 5))) if unit.option.compresses and rng.random() < 0.5 else unit
        for unit in units
    ]


@pytest.mark.parametrize("movable", [False, True])
def test_the_time_of_trials_is_that_of_their_units_after_any_changes(movable):
    """And what was promised before each change. Units in chunks are replaced like others, but not cut or merged."""
    done = {"replace": 0, "merge": 0, "cut": 0}
    for rng, case in random_cases(5, 15, limited=False):
        trace, menu = case.trace, case.menu
        trials = Trials(some_in_chunks(rng, case.units), trace, menu, movable)
        assert trials.time == pytest.approx(case.seconds(trials.units), rel=1e-12)
        for _ in range(25):
            places, choice = trials.places, rng.randrange(len(menu.choices))
            index = rng.randrange(len(places))
            pair = places[index : index + 2]
            whole = not any(trials.at(place).chunk_numel for place in pair)
            together = len(pair) == 2 and trials.at(pair[0]).dtype == trials.at(pair[1]).dtype
            way = rng.choice(["replace", "merge", "cut"])
            if way == "cut" and movable and whole and (together or len(pair) == 1):
                start, stop = trials.at(pair[0]).start, trials.at(pair[-1]).stop
                inner = sorted(rng.sample(range(start + 1, stop), rng.randint(0, min(2, stop - start - 1))))
                parts = [Unit.of(trace, *run, *rng.choice(menu.choices)) for run in itertools.pairwise([start, *inner, stop])]
                promised = trials.time_cut(pair, parts)
                trials.cut(pair, parts)
            elif way == "merge" and whole and together:
                promised = trials.time_merged(*pair, choice)
                trials.merge(*pair, choice)
            else:
                way, promised = "replace", trials.time_with(places[index], choice)
                trials.replace(places[index], choice)
                assert trials.choice(places[index]) == choice or not menu.choices[choice].option.compresses
            done[way] += 1
            assert trials.time == pytest.approx(promised, rel=1e-12)
            assert trials.time == pytest.approx(case.seconds(trials.units), rel=1e-12)
    assert all(done.values()) or not movable


def test_a_unit_that_was_uncompressed_for_a_while_is_still_in_its_chunks():
    """`cut_into_chunks` starts new trials from units of which some went uncompressed after they had been given a chunk size."""
    for rng, case in random_cases(6, 3, limited=False):
        trials = Trials(some_in_chunks(rng, case.units), case.trace, case.menu)
        place, plain = rng.choice(trials.places), int(case.menu.uncompressed[0])
        packed = trials.choice(place)
        trials.replace(place, plain)
        again = trials.copy()
        assert again.time == pytest.approx(case.seconds(again.units), rel=1e-12)
        again.replace(place, packed)
        assert again.time == pytest.approx(case.seconds(again.units), rel=1e-12)
