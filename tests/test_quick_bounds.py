"""The two bounds by which the search stops early: never above what any plan takes, and reached where that can be seen by hand."""

import itertools
import random
from dataclasses import replace

import pytest
from planner_cases import (
    cluster_of,
    codecs_of,
    flat_options,
    menu_of,
    nested_cluster_of,
    random_case,
    random_nested_case,
    small_menu,
    trace_of,
)

from espresso_ds.core.config import Constraints
from espresso_ds.core.option import Device
from espresso_ds.planner.chunk import cut_into_chunks
from espresso_ds.planner.fuse import singles
from espresso_ds.planner.limits import Limits
from espresso_ds.planner.menu import GRID
from espresso_ds.planner.quick_bounds import LEAST_PIECE, last_bound_s, singles_bound_s
from espresso_ds.planner.search import best_plan
from espresso_ds.planner.timeline import Unit, iteration_time
from espresso_ds.planner.trials import Trials

N = 2**20
GATHERED = "C.cpu AG.flat D.cpu"
DIVIDED = "C.cpu A2A.flat D.cpu C.cpu AG.flat D.cpu"
CPU = [
    (random_case, "cpu", list(map(str, flat_options([Device.CPU])))),
    (random_nested_case, "cpu", ["AR.flat", GATHERED, "RS.intra AR.inter AG.intra", "RS.intra C.cpu AG.inter D.cpu AG.intra"]),
]
GPU = [
    (random_case, "cuda", ["AR.flat", "C.gpu AG.flat D.gpu", GATHERED, "C.gpu A2A.flat D.gpu C.gpu AG.flat D.cpu"]),
    (random_nested_case, "cuda", ["AR.flat", "RS.intra C.gpu AG.inter D.cpu AG.intra", "RS.intra AR.inter AG.intra"]),
]
ROUNDED = 1 + 1e-9


def cuts(count):
    """Every way to cut so many tensors into runs of neighbours."""
    for inside in range(count):
        for edges in itertools.combinations(range(1, count), inside):
            yield list(itertools.pairwise((0, *edges, count)))


def optimum(trace, menu, every_cut):
    """The least F(S) over every choice of every unit: found with `Trials`, told by the reference."""
    least, best = float("inf"), None
    for runs in every_cut:
        units = [Unit.of(trace, *run) for run in runs]
        trials = Trials(units, trace, menu)
        for plan in itertools.product(range(len(menu.choices)), repeat=len(runs)):
            time = trials.time_with_all(list(enumerate(plan)), least)
            if time < least:
                chosen = [menu.choices[choice] for choice in plan]
                least, best = time, [replace(u, option=o, codec=c) for u, (o, c) in zip(units, chosen, strict=True)]
    return iteration_time(best, trace, menu.costs)


def instances(seed, count, tensors):
    rng = random.Random(seed)
    for make_case, device, options in CPU + GPU:
        for number in range(count):
            case = make_case(rng, tensors=tensors, equal=number % 3 == 0, device=device)
            yield rng, case[0], small_menu(*case, options)


def test_the_last_tensor_bounds_every_plan():
    """All ways to cut three tensors, all choices of every unit. It says more than the compute alone, and is reached at times."""
    more, reached = 0, 0
    for _, trace, menu in instances(1, 15, tensors=3):
        bound, best = last_bound_s(trace, menu), optimum(trace, menu, cuts(3))
        assert trace.compute_s <= bound <= best * ROUNDED
        more += bound > trace.compute_s * 1.01
        reached += best <= bound * (1 + 1e-6)
    assert more > 20 and reached > 3


def test_single_tensors_are_bounded_by_their_work():
    """All choices of four tensors, each by itself."""
    more = 0
    for _, trace, menu in instances(2, 12, tensors=4):
        bound, best = singles_bound_s(trace, menu), optimum(trace, menu, [[(i, i + 1) for i in range(4)]])
        assert bound <= best * ROUNDED
        more += bound > trace.compute_s * 1.01
    assert more > 5


def uneven(profile, rng):
    """The same costs, measured with 30% of noise: some larger sizes are then cheaper than smaller ones."""

    def noisy(values):
        return tuple(value * rng.uniform(0.7, 1.3) for value in values)

    codec = profile.codecs[0]
    devices = tuple(d.model_copy(update={"encode_s": noisy(d.encode_s), "decode_s": noisy(d.decode_s)}) for d in codec.devices)
    return profile.model_copy(update={"codecs": (codec.model_copy(update={"devices": devices}),)})


SIZES = tuple(2**power for power in range(10, 25, 2))


def noisy_instances(seed, count, tensors):
    rng = random.Random(seed)
    for _ in range(count):
        world = rng.choice([2, 4])
        rows = [(int(2 ** rng.uniform(10, 18)), 0.002 * (place + 1)) for place in range(tensors)]
        trace = trace_of(rows, world=world, backward_s=0.002 * tensors + 0.001)
        cluster = cluster_of(world=world, alpha_s=10 ** rng.uniform(-5, -3), bytes_per_s=10 ** rng.uniform(6, 7), sizes=SIZES)
        codecs = uneven(codecs_of(encode=3e-9, decode=1e-9, fixed_s=3e-3, sizes=SIZES, share=0.02), rng)
        yield trace, small_menu(trace, cluster, codecs, ["AR.flat", GATHERED, DIVIDED])


def test_bounds_hold_where_larger_sizes_were_measured_cheaper_than_smaller_ones():
    for trace, menu in noisy_instances(3, 60, tensors=3):
        assert last_bound_s(trace, menu) <= optimum(trace, menu, cuts(3)) * ROUNDED
        assert singles_bound_s(trace, menu) <= optimum(trace, menu, [[(0, 1), (1, 2), (2, 3)]]) * ROUNDED


@pytest.mark.parametrize("make_case", [random_case, random_nested_case])
def test_the_work_of_single_tensors_over_the_whole_tree(make_case):
    """Sizes between those of GRID, where the choices worth trying may be others: none loads a tensor's resources less."""
    rng = random.Random(4)
    assert not {2**11, 2**17, 2**23} & set(GRID)
    for _ in range(10):
        case = make_case(rng, tensors=4)
        menu = menu_of(*case, Constraints())
        rows = [(rng.choice([2**11, 2**17, 2**23]) + rng.randrange(99), 1e-3 * (place + 1)) for place in range(4)]
        shape = {"world": case[0].world_size, "node": case[0].ranks_per_node}
        trace = trace_of(rows, **shape)
        trials = Trials(singles(trace), trace, menu)
        for place in rng.sample(range(4), 4) * 2:
            _, choice = trials.best(place, menu.everything, float("inf"))
            trials.replace(place, choice)
        assert singles_bound_s(trace, menu) <= iteration_time(trials.units, trace, menu.costs) * ROUNDED
        assert last_bound_s(trace, menu) <= iteration_time(trials.units, trace, menu.costs) * ROUNDED


def test_chunks_are_plans_too():
    """A large last tensor, whose compression, transfer and decompression overlap once it is cut."""
    rng = random.Random(5)
    for _ in range(20):
        numel = int(2 ** rng.uniform(22, 25))
        trace = trace_of([(N, 0.01), (numel, 0.02)])
        codecs = codecs_of(
            encode=10 ** rng.uniform(-9.5, -8.5), decode=10 ** rng.uniform(-9.5, -8.5), share=rng.uniform(0.01, 0.1)
        )
        menu = small_menu(trace, cluster_of(alpha_s=1e-4, bytes_per_s=10 ** rng.uniform(7, 8)), codecs, ["AR.flat", GATHERED])
        units = [Unit.of(trace, 0, 1), Unit.of(trace, 1, 2, *menu.choices[1])]
        cut = cut_into_chunks(units, trace, menu, Limits(trace, menu))
        assert last_bound_s(trace, menu) <= iteration_time(cut, trace, menu.costs) * ROUNDED


def test_the_search_does_not_stop_before_chunks_that_gain():
    """One tensor at the end of backward: in one piece it takes what the last tensor's way takes, in chunks it takes less."""
    trace = trace_of([(2**24, 1.0)])
    menu = small_menu(
        trace, cluster_of(alpha_s=1e-4, bytes_per_s=2.4e7), codecs_of(encode=5e-9, decode=2e-9, share=0.05), ["AR.flat", GATHERED]
    )
    found = best_plan(trace, menu)
    again = cut_into_chunks(found, trace, menu, Limits(trace, menu))
    assert iteration_time(found, trace, menu.costs) <= iteration_time(again, trace, menu.costs) * ROUNDED


def test_the_way_of_the_last_tensor_by_hand():
    """0.1 s of forward, 1 s until it is ready, 0.5 s on the link, 0.2 s after; what comes before is small and early."""
    cluster = cluster_of(bytes_per_s=4 * N / 0.5)
    before = [(2**10, 0.1), (2**10, 0.2)]
    trace = trace_of([*before, (N, 1.0)], forward_s=0.1, backward_s=1.2, after_s=0.2)
    menu = small_menu(trace, cluster, codecs_of(), ["AR.flat"])
    assert last_bound_s(trace, menu) == pytest.approx(0.1 + 1.0 + 0.5 + 0.2, rel=1e-12)
    assert iteration_time(singles(trace), trace, menu.costs) == pytest.approx(1.8, rel=1e-12)
    late = trace.model_copy(update={"backward_s": 1.8})
    assert (
        last_bound_s(late, menu) == pytest.approx(0.1 + 1.8 + 0.2, rel=1e-12) == iteration_time(singles(late), late, menu.costs)
    )
    codecs = codecs_of(encode=0.1 / N, decode=0.05 / 2 / N, share=1e-3, fixed_s=0.0)
    quicker = small_menu(trace, cluster, codecs, ["AR.flat", GATHERED])
    assert last_bound_s(trace, quicker) == pytest.approx(0.1 + 1.2 + 0.2, rel=1e-12), "0.15 s: done under backward"
    at_once = trace.model_copy(update={"backward_s": 1.0})
    share = min(1.0, LEAST_PIECE / N)  # of the tensor, in the first of its chunks
    assert last_bound_s(at_once, quicker) == pytest.approx(0.1 + 1.0 + 0.15 * share + 0.2, rel=1e-3)


@pytest.mark.parametrize("count", [1, 10, 100])
def test_a_link_that_is_never_idle_by_hand(count):
    """Equal tensors that are ready at once, 10 ms each on the link: nothing else can be shorter, nor is the bound."""
    trace = trace_of([(N, 1e-3)] * count, forward_s=0.05, after_s=0.01)
    flat = small_menu(trace, cluster_of(bytes_per_s=4 * N / 0.01), codecs_of(), ["AR.flat"])
    time = 0.05 + 1e-3 + 0.01 * count + 0.01
    assert iteration_time(singles(trace), trace, flat.costs) == pytest.approx(time, rel=1e-9)
    assert singles_bound_s(trace, flat) == pytest.approx(time, rel=2e-3)
    nested = nested_cluster_of(bytes_per_s=(1e15, 4 * N / 0.01))
    both = trace_of([(N, 1e-3)] * count, world=4, node=2)
    menu = small_menu(both, nested, codecs_of(), ["RS.intra AR.inter AG.intra"])
    time = iteration_time(singles(both, menu.choices[0]), both, menu.costs)
    assert singles_bound_s(both, menu) == pytest.approx(time, rel=2e-3)
