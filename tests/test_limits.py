"""What a plan must keep to, and that it uses what it is given."""

import itertools
import random

import pytest
from planner_cases import (
    cluster_of,
    codecs_of,
    flat_options,
    menu_of,
    random_case,
    random_nested_case,
    residual_bytes,
    several,
    small_menu,
    trace_of,
)

from espresso_ds.core.config import CompressorSettings, Constraints
from espresso_ds.core.errors import FileError
from espresso_ds.core.option import Device, Level, Option
from espresso_ds.planner.build import in_wire_order, make_plan, units_of
from espresso_ds.planner.limits import Limits
from espresso_ds.planner.search import best_plan
from espresso_ds.planner.timeline import Unit, iteration_time
from espresso_ds.planner.trials import Trials

NAMES = ("embed.weight", "h.0.norm.weight", "h.0.fc.weight", "h.0.fc.bias", "h.1.norm.weight", "head.weight")
GATHERED = Option.parse("C.cpu AG.flat D.cpu")


def named_case(codecs=None, contention=0.0):
    """Six tensors with a model's names, behind a link so slow that everything is worth compressing."""
    trace = trace_of([(2**18, 0.01 * (i + 1)) for i in range(len(NAMES))])
    tensors = [tensor.model_copy(update={"name": name}) for tensor, name in zip(trace.tensors, NAMES, strict=True)]
    trace = trace.model_copy(update={"tensors": tuple(tensors)})
    cluster = cluster_of(alpha_s=1e-4, bytes_per_s=1e7, contention=contention)
    return trace, cluster, codecs or codecs_of(share=0.02, summable=False)


def compressed(plan):
    return {tensor.name for tensor in plan.tensors if Option.parse(tensor.option).compresses}


def plan_with(*case, **more):
    return make_plan(*case, made_by="tests", thrift=0.0, **more)


def test_everything_is_compressed_without_limits():
    assert compressed(plan_with(*named_case())) == set(NAMES)


@pytest.mark.parametrize("patterns", [("*norm*", "*.bias"), ("embed.*",), ("h.0.*", "head.weight"), ("*",), ("nothing",)])
def test_exact_tensors_are_never_compressed(patterns):
    plan = plan_with(*named_case(), constraints=Constraints(exact=patterns))
    kept = {"*norm*": {1, 4}, "*.bias": {3}, "embed.*": {0}, "h.0.*": {1, 2, 3}, "head.weight": {5}, "*": set(range(6))}
    exact = {NAMES[place] for pattern in patterns for place in kept.get(pattern, set())}
    assert compressed(plan) == set(NAMES) - exact


@pytest.mark.parametrize("feedback", ["ef", "none"])
def test_residuals_stay_within_their_memory_and_use_it(feedback):
    trace, cluster, codecs = named_case()
    settings = CompressorSettings(name="topk", density=0.01, feedback=feedback)
    codecs = codecs.model_copy(update={"codecs": (codecs.codecs[0].model_copy(update={"compressor": settings}),)})
    one = 4 * 2**18
    for most in (0, one - 1, one, 3 * one + 5, 100 * one):
        plan = plan_with(trace, cluster, codecs, constraints=Constraints(residual_bytes=most))
        if feedback == "none":
            assert len(compressed(plan)) == len(NAMES)
        else:  # what is compressed after a reduce-scatter takes half as much
            units = units_of(plan, in_wire_order(trace))
            assert sum(residual_bytes(unit, 2, 1) for unit in units) <= most
            assert len(compressed(plan)) >= min(len(NAMES), most // one)


def test_thrift_keeps_to_the_memory_of_residuals():
    """A codec that remembers and loses less is taken where thrift leaves time, for as many tensors as there is memory for."""
    trace, cluster, _ = named_case()
    found = several(codecs_of(share=0.02, summable=False), codecs_of(share=0.021, summable=False), errors=ERRORS)
    with_feedback = [
        codec.model_copy(update={"compressor": CompressorSettings(name="topk", density=0.01, feedback=feedback, seed=number)})
        for number, (codec, feedback) in enumerate(zip(found.codecs, ("none", "ef"), strict=True))
    ]
    codecs, one = found.model_copy(update={"codecs": tuple(with_feedback)}), 4 * 2**18
    for most in (one, 3 * one):
        plan = make_plan(trace, cluster, codecs, made_by="tests", thrift=0.3, constraints=Constraints(residual_bytes=most))
        remembering = [unit for unit in units_of(plan, in_wire_order(trace)) if unit.option.compresses and unit.codec == 1]
        assert 0 < sum(residual_bytes(unit, 2, 1) for unit in remembering) <= most


ERRORS = (0.6, 0.1)


def two_codecs():
    """One with small payloads that loses much, one with payloads four times as large that loses less."""
    return several(codecs_of(share=0.02), codecs_of(share=0.08), errors=ERRORS)


def error_of(plan):
    numel = sum(tensor.numel for tensor in plan.tensors)
    lost = sum(t.numel * ERRORS[t.codec] for t in plan.tensors if Option.parse(t.option).compresses)
    return lost / numel


def test_the_error_budget_is_kept_and_used():
    case = named_case(two_codecs())
    times, errors = [], []
    for budget in (0.01, 0.02, 0.1, 0.2, 0.4, 0.6, 1.0):
        plan = plan_with(*case, error_budget=budget)
        errors.append(error_of(plan))
        assert errors[-1] <= budget * (1 + 1e-12)
        times.append(plan.predicted.planned_s)
    assert errors[0] == 0.0, "a sixth of the elements with the better codec already loses 0.0167"
    assert errors[1] == pytest.approx(0.1 / 6)
    free = plan_with(*case)
    assert (times[-1], errors[-1]) == (free.predicted.planned_s, error_of(free))


def test_a_larger_error_budget_never_makes_the_plan_slower():
    """What keeps to a small budget keeps to a large one: at 0.1 all six tensors may have the codec that loses less."""
    case = named_case(two_codecs())
    times = [
        plan_with(*case, error_budget=budget).predicted.planned_s for budget in (0.01, 0.02, 0.05, 0.09, 0.11, 0.2, 0.4, 0.6)
    ]
    assert all(after <= before * 1.01 for before, after in itertools.pairwise(times)), times


def test_plans_under_a_budget_are_mostly_the_best_there_are():
    """Brute force over all plans of three tensors with two codecs that keep to the budget, one tensor a unit."""
    rng, optimal, rounds, some_bound = random.Random(1), 0, 40, 0
    for _ in range(rounds):
        trace, cluster, one = random_case(rng, tensors=3)
        codecs = several(one, random_case(rng, tensors=1)[2], errors=(0.5, 0.2))
        menu = small_menu(
            trace, cluster, codecs, ["AR.flat", GATHERED, "C.cpu A2A.flat D.cpu AG.flat", "RS.flat C.cpu AG.flat D.cpu"]
        )
        budget = rng.choice([0.1, 0.25, 0.4])
        units = [Unit.of(trace, i, i + 1) for i in range(3)]
        total = sum(unit.numel for unit in units)
        trials = Trials(units, trace, menu)
        least = free = float("inf")
        for plan in itertools.product(range(len(menu.choices)), repeat=3):
            error = sum(
                unit.numel * (0.5, 0.2)[menu.choices[choice].codec]
                for unit, choice in zip(units, plan, strict=True)
                if menu.choices[choice].option.compresses
            )
            time = trials.time_with_all(list(enumerate(plan)))
            free = min(free, time)
            least = min(least, time) if error <= budget * total else least
        found = iteration_time(best_plan(trace, menu, Limits(trace, menu, error_budget=budget), fused=False), trace, menu.costs)
        assert found >= least * (1 - 1e-9), "no plan that keeps to the budget is faster"
        optimal += found <= least * (1 + 1e-9)
        some_bound += least > free * (1 + 1e-9)
    assert some_bound > 5
    assert optimal / rounds >= 0.7


@pytest.mark.parametrize("make_case", [random_case, random_nested_case])
def test_limits_hold_together_on_random_cases(make_case):
    rng = random.Random(2)
    for _ in range(15):
        trace, cluster, one = make_case(rng, tensors=7)
        codecs = several(one, make_case(rng, tensors=1)[2], errors=ERRORS)
        menu = menu_of(trace, cluster, codecs, Constraints(max_compressions=1))
        total = sum(tensor.numel for tensor in trace.tensors)
        exact = rng.sample(range(7), 2)
        memory, budget = rng.uniform(0, 4 * total), rng.uniform(0.05, 0.6)
        units = best_plan(trace, menu, Limits(trace, menu, exact, memory, budget))
        lossy = [unit for unit in units if unit.option.compresses]
        assert all(unit.option.compressions == 1 for unit in lossy)
        assert not any(unit.start <= place < unit.stop for unit in lossy for place in exact)
        assert sum(residual_bytes(unit, *menu.costs.shape) for unit in lossy) <= memory * (1 + 1e-9)
        assert sum(ERRORS[unit.codec] * unit.numel for unit in lossy) <= budget * total * (1 + 1e-12)


def test_summable_only_keeps_codecs_whose_payloads_can_be_summed():
    mixed = several(codecs_of(share=0.01), codecs_of(share=0.1, summable=True))
    plan = plan_with(*named_case(mixed), constraints=Constraints(summable_only=True))
    assert compressed(plan) and {tensor.codec for tensor in plan.tensors if tensor.name in compressed(plan)} == {1}
    with pytest.raises(FileError, match="summable_only, but payloads of topk cannot be summed; add such a codec"):
        plan_with(*named_case(), constraints=Constraints(summable_only=True))


def test_only_summable_codecs_are_summed():
    mixed = several(codecs_of(), codecs_of(summable=True))
    choices = menu_of(*named_case(mixed)).choices
    assert {choice.codec for choice in choices if choice.option.sums_payloads} == {1}
    assert len(choices) == 3 + 9 + 10, "three uncompressed, nine of each codec and one that sums"


def test_constraints_of_the_tree_reach_the_plan():
    case = random_nested_case(random.Random(4), tensors=5)
    assert len(menu_of(*case).choices) == 174
    for constraints in (Constraints(max_compressions=1), Constraints(forbid=("A2A", "GA.inter")), Constraints(flat_only=True)):
        options = [choice.option for choice in menu_of(*case, constraints).choices]
        assert 12 <= len(options) < 174
        if constraints.flat_only:
            assert options == flat_options([Device.CPU])
        texts = {tensor.option for tensor in plan_with(*case, constraints=constraints).tensors}
        assert texts <= set(map(str, options))
    assert all(option.levels == {Level.FLAT} for option in options)
    assert compressed(plan_with(*named_case(), constraints=Constraints(max_compressions=0))) == set()
