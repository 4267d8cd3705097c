"""The native timeline of the search against the reference in Python, and planning without it."""

import itertools
import random
import warnings

import numpy as np
import pytest
from planner_cases import menu_of, random_case, random_nested_case

from espresso_ds.core import native as compiled
from espresso_ds.core.config import Constraints
from espresso_ds.planner import native
from espresso_ds.planner.limits import Limits
from espresso_ds.planner.menu import Menu
from espresso_ds.planner.player import NativePlayer, PythonPlayer
from espresso_ds.planner.search import best_plan

CASES = [(random_case, "cpu"), (random_case, "cuda"), (random_nested_case, "cpu"), (random_nested_case, "cuda")]
FLAT_ON_GPU = Constraints(forbid=("cpu",), flat_only=True)


@pytest.fixture
def library():
    """The native library; a failure, not a skip, where a compiler made none: the search relies on it."""
    found = native.library()
    assert found is not None, "espresso_ds was built without its native code"
    return found


@pytest.fixture
def without_library(monkeypatch, tmp_path):
    """As if espresso_ds had been installed without a compiler."""
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "core" / "native.py"))
    forget_library()
    yield
    forget_library()


def forget_library():
    compiled.library.cache_clear()
    native.library.cache_clear()


def cases(seed, count, most=12):
    """Random traces with the menus of the tree's options, and sizes that differ from call to call."""
    rng = random.Random(seed)
    for make_case, device in CASES:
        for _ in range(count):
            case = make_case(rng, tensors=rng.randint(1, most), device=device)
            constraints = FLAT_ON_GPU if device == "cuda" and make_case is random_nested_case else Constraints()
            yield rng, case[0], menu_of(*case, constraints)


def sized(rng):
    return int(2 ** rng.uniform(3, 24))


def players(rng, trace, menu):
    """Both players of one random plan, in which some units do nothing."""
    ready = [tensor.ready_s for tensor in trace.tensors]
    if rng.random() < 0.3:
        ready = [rng.choice(ready[: place + 1]) for place in range(len(ready))]
        ready.sort()  # with units that are ready at once, as chunks are
    both = [cls(ready, trace.backward_s, menu) for cls in (NativePlayer, PythonPlayer)]
    for unit in range(len(ready)):
        numel, choice = sized(rng), random_choice(rng, menu)
        for one in both:
            one.set(unit, numel, choice)
    return both


def random_choice(rng, menu):
    return -1 if rng.random() < 0.1 else rng.randrange(len(menu.choices))


def test_seconds_of_every_operation_are_equal(library):
    for rng, _, menu in cases(1, 3):
        for numel in (1, 7, 64, 4097, 10**9, *(sized(rng) for _ in range(5))):
            found = np.empty(len(menu.operations))
            library.espresso_menu_seconds(menu.native, numel, found.ctypes.data)
            expected = [float(menu.costs.seconds(op, numel)) for op in menu.operations]
            assert found == pytest.approx(expected, rel=1e-12)


def test_ends_are_equal_to_the_bit_and_as_much_is_hidden(library):
    some_hidden = 0
    for rng, trace, menu in cases(2, 40):
        fast, slow = players(rng, trace, menu)
        assert fast.end() == slow.end()
        assert fast.hidden() == slow.hidden()
        some_hidden += fast.hidden() > 0
        for _ in range(4):  # with only a part to play again
            change = rng.randrange(len(trace.tensors)), sized(rng), random_choice(rng, menu)
            fast.set(*change)
            slow.set(*change)
            assert fast.end() == slow.end()
            assert fast.hidden() == slow.hidden()
    assert some_hidden > 10


def test_attempts_are_equal_and_leave_no_trace(library):
    for rng, trace, menu in cases(3, 40):
        fast, slow = players(rng, trace, menu)
        before = fast.end()
        for _ in range(6):
            units = rng.sample(range(len(trace.tensors)), min(len(trace.tensors), rng.choice([1, 1, 2, 4])))
            changes = [(unit, sized(rng), random_choice(rng, menu)) for unit in units]
            exact = slow.attempt(changes)
            assert fast.attempt(changes) == pytest.approx(exact, rel=1e-12)
            for limit in (exact * rng.uniform(0.5, 0.999), exact * rng.uniform(1.001, 2)):
                found = fast.attempt(changes, limit)
                if exact <= limit:
                    assert found == pytest.approx(exact, rel=1e-12)
                else:
                    assert found > limit
            assert fast.end() == before == slow.end()


def test_the_best_choice_is_the_same(library):
    found = 0
    for rng, trace, menu in cases(4, 15, most=8):
        fast, slow = players(rng, trace, menu)
        unit, numel = rng.randrange(len(trace.tensors)), sized(rng)
        choices = np.array(rng.sample(range(len(menu.choices)), min(len(menu.choices), 40)), dtype=np.int32)
        for below in (float("inf"), slow.end(), slow.end() * rng.uniform(0.7, 1)):
            (time, choice), (exact, expected) = fast.best(unit, numel, choices, below), slow.best(unit, numel, choices, below)
            assert time == pytest.approx(exact, rel=1e-12)
            if choice != expected:  # only where two are equal but for rounding
                assert min(choice, expected) >= 0
                ends = [slow.attempt([(unit, numel, each)]) for each in (choice, expected)]
                assert ends[0] == pytest.approx(ends[1], rel=1e-12)
            found += choice >= 0
        assert fast.best(unit, numel, choices, 0.0) == (0.0, -1)
    assert found > 40


def on_front(weights, tolerance):
    """Rows that no other one beats, by the definition and one by one: the least total first."""
    kept = []
    for row in sorted(range(len(weights)), key=lambda row: (sum(weights[row]), row)):
        if not any(all(o <= w * (1 + tolerance) for o, w in zip(weights[k], weights[row], strict=True)) for k in kept):
            kept.append(row)
    return kept


def test_fronts_are_those_of_the_definition(library):
    for rng, _, menu in cases(5, 3):
        numel = sized(rng)
        weights = []
        for choice in range(len(menu.choices)):
            steps = menu.walk(choice, numel).steps
            links = [place for place, step in enumerate(steps) if step.resource >= 2]
            load = [sum(step.seconds for step in steps if step.resource == resource) for resource in range(4)]
            ends = [sum(step.seconds for step in part) for part in (steps[: links[0]], steps[links[-1] + 1 :])]
            weights.append([*load, *ends])
        expected = set()
        for codec in set(menu.codec.tolist()):  # uncompressed choices and each codec's have a front of their own
            group = [weights[row] for row in range(len(weights)) if menu.codec[row] == codec]
            expected |= {tuple(group[row]) for row in on_front(group, 1e-3)}
        found = menu.front(numel, menu.everything)
        assert len(found) == len(set(found.tolist()))
        for choice in found.tolist():
            assert any(weights[choice] == pytest.approx(point, rel=2e-3, abs=1e-15) for point in expected)
        assert len(found) == pytest.approx(len(expected), abs=2)
        for point in weights:  # nothing is left out that is better than all of the front
            assert any(
                all(o <= p * (1 + 3e-3) + 1e-15 for o, p in zip(weights[choice], point, strict=True)) for choice in found.tolist()
            )


def test_without_the_library_all_plans_are_the_same_with_one_warning(without_library):
    rng = random.Random(6)
    small = [make_case(rng, tensors=4, device="cpu") for make_case in (random_case, random_nested_case, random_case)]

    def plans():
        return [
            [best_plan(case[0], menu, Limits(case[0], menu), fused=fused) for fused in (False, True)] for case, menu in menus()
        ]

    def menus():
        return [(case, menu_of(*case, Constraints(max_compressions=1))) for case in small]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        slow = plans()
    told = [str(one.message) for one in caught if issubclass(one.category, RuntimeWarning)]
    assert len(told) == 1 and "without its native code" in told[0] and "install a C++ compiler" in told[0]
    assert native.library() is None
    fast = None
    forget_library()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "__file__", compiled.__spec__.origin)
        assert native.library() is not None, "espresso_ds was built without its native code"
        fast = plans()
    forget_library()
    assert slow == fast
    assert any(unit.option.compresses for unit in itertools.chain(*itertools.chain(*slow)))
    assert isinstance(menus()[0][1], Menu)
