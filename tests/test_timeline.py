"""Timelines drawn by hand, an independent simulator, and properties that any timeline has.

In the pictures a column is a second, one element takes a second on the link, and compressing takes half a second per element.
"""

import heapq
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_cases import (
    cluster_of,
    codecs_of,
    costs_of,
    menu_of,
    nested_cluster_of,
    random_case,
    random_nested_case,
    small_menu,
    trace_of,
)

from espresso_ds.core.config import Constraints
from espresso_ds.core.errors import FileError
from espresso_ds.core.option import Device, Level, Option, Task
from espresso_ds.core.profile import ClusterProfile
from espresso_ds.planner.chrome import to_chrome
from espresso_ds.planner.cost import LINKS, Costs, Resource
from espresso_ds.planner.curves import undisturbed
from espresso_ds.planner.fuse import fuse, singles
from espresso_ds.planner.limits import Limits
from espresso_ds.planner.timeline import Unit, iteration_time, simulate, stock_time, stock_timeline
from espresso_ds.planner.tree import allowed, option_tree
from espresso_ds.planner.trials import Trials

AR, RS_AG = Option.parse("AR.flat"), Option.parse("RS.flat AG.flat")
GATHERED = {device: Option.parse(f"C.{device} AG.flat D.{device}") for device in ("cpu", "gpu")}


def plain_costs(device="cpu", contention=0.0):
    """Two ranks: AR of n elements takes n seconds, C n/2; payloads are a quarter, so AG n/4; D n/4 for each of two payloads."""
    codecs = codecs_of(device=device, encode=0.5, decode=0.25, share=1 / 4, contention=contention, sizes=(1, 1024))
    return Costs(cluster_of(), codecs)


def work(timeline):
    """Spans of the units as {(unit, action): (start, end)}."""
    return {(s.unit, s.action): (s.start_s, s.end_s) for s in timeline.spans if s.unit >= 0}


def units_with(trace, *options):
    return [Unit.of(trace, i, i + 1, option) for i, option in enumerate(options)]


def test_the_link_serves_one_unit_after_the_other():
    """
    backward  . 0 1
    link      . 0 0 0 1 1
    """
    trace = trace_of([(3, 1.0), (2, 2.0)])
    timeline = simulate(units_with(trace, AR, AR), trace, plain_costs())
    assert work(timeline) == {(0, "AR.flat"): (1, 4), (1, "AR.flat"): (4, 6)}
    assert (timeline.iteration_s, timeline.exposed_s, timeline.bubbles, timeline.hidden) == (6, 4, (), frozenset())


def test_a_bubble_hides_what_is_sent_before_it():
    """
    forward   F F
    backward  . . . 0 . . 1
    link      . . . 0 - - 1 1
    after                     X
    """
    trace = trace_of([(1, 1.0), (2, 4.0)], forward_s=2, after_s=1)
    timeline = simulate(units_with(trace, AR, AR), trace, plain_costs())
    assert work(timeline) == {(0, "AR.flat"): (3, 4), (1, "AR.flat"): (6, 8)}
    assert timeline.bubbles == ((4, 6),)
    assert timeline.hidden == {0}
    assert timeline.iteration_s == 9


def test_codec_work_on_the_cpu_slows_backward_by_its_contention():
    """Contention 1/2: two seconds of C take three and delay the backward by one; D runs faster once backward has ended.

    backward  . . 0 - - - - - 1 .
    cpu       . . C C C . D D D D
    link      . . . . . 0 . . 1
    """
    trace = trace_of([(4, 2.0), (1, 6.0)], backward_s=6.5)
    timeline = simulate(units_with(trace, GATHERED["cpu"], AR), trace, plain_costs(contention=0.5))
    assert work(timeline) == {(0, "C.cpu"): (2, 5), (0, "AG.flat"): (5, 6), (0, "D.cpu"): (6, 8.75), (1, "AR.flat"): (7.5, 8.5)}
    assert (timeline.backward_end_s, timeline.iteration_s) == (8.25, 8.75)


def test_codec_work_on_the_gpu_stops_backward():
    """
    backward  . . 0 - - . - - 1 .
    codec         C C   D D
    link      . . . . 0 . . . 1
    """
    trace = trace_of([(4, 2.0), (1, 4.0)], backward_s=5, device="cuda")
    timeline = simulate(units_with(trace, GATHERED["gpu"], AR), trace, plain_costs("gpu"))
    assert work(timeline) == {(0, "C.gpu"): (2, 4), (0, "AG.flat"): (4, 5), (0, "D.gpu"): (5, 7), (1, "AR.flat"): (8, 9)}
    assert (timeline.backward_end_s, timeline.iteration_s) == (9, 9)
    backward = [(s.start_s, s.end_s) for s in timeline.spans if s.action == "backward"]
    assert backward == [(0, 2), (4, 5), (7, 9)]


def test_after_backward_codec_work_delays_nothing():
    trace = trace_of([(4, 2.0)])
    timeline = simulate(units_with(trace, GATHERED["cpu"]), trace, plain_costs(contention=1.0))
    assert (timeline.backward_end_s, timeline.iteration_s) == (2, 7)


def test_second_steps_queue_with_first_steps():
    """First come first served: unit 1's first step asked before unit 0's second.

    link      . 0 0 1 0 0 1
    """
    trace = trace_of([(4, 1.0), (2, 2.0)])
    units = units_with(trace, RS_AG, RS_AG)
    spans = sorted(s.start_s for s in simulate(units, trace, plain_costs()).spans if s.resource is Resource.INTER)
    assert work(simulate(units, trace, plain_costs())) == {
        (0, "RS.flat"): (1, 3),
        (1, "RS.flat"): (3, 4),
        (0, "AG.flat"): (4, 6),
        (1, "AG.flat"): (6, 7),
    }
    assert spans == [1, 3, 4, 6]


def test_a_lane_serves_one_unit_at_a_time():
    """Unit 1's allgather waits for lane 1, which is decompressing unit 0, though the link is free.

    cpu       . C C . D D
    link      . . . 0 1 - 1
    """
    trace = trace_of([(4, 1.0), (2, 3.0)])
    spans = work(simulate(units_with(trace, GATHERED["cpu"], RS_AG), trace, plain_costs()))
    assert spans[0, "D.cpu"] == (4, 6)
    assert (spans[1, "RS.flat"], spans[1, "AG.flat"]) == ((4, 5), (6, 7))


def test_two_links_work_at_once():
    """Two nodes of two ranks: a routine inside the node takes two seconds, one between the nodes one.

    intra     . 0 0 1 1 . 0 0 1 1
    inter     . . . 0 . 1
    """
    trace = trace_of([(8, 1.0), (8, 1.0)], world=4, node=2)
    costs = Costs(nested_cluster_of(alpha_s=(0.0, 0.0), bytes_per_s=(8.0, 32.0)), codecs_of())
    nested = Option.parse("RS.intra AR.inter AG.intra")
    timeline = simulate(units_with(trace, nested, nested), trace, costs)
    assert work(timeline) == {
        (0, "RS.intra"): (1, 3),
        (1, "RS.intra"): (3, 5),
        (0, "AR.inter"): (3, 4),
        (0, "AG.intra"): (5, 7),
        (1, "AR.inter"): (5, 6),
        (1, "AG.intra"): (7, 9),
    }
    resources = {s.action: s.resource for s in timeline.spans if s.unit >= 0}
    assert resources == {"RS.intra": Resource.INTRA, "AR.inter": Resource.INTER, "AG.intra": Resource.INTRA}


def test_units_are_handed_on_in_plan_order():
    """Unit 1 is through its first routine at 2, but the next lane takes it only after unit 0, whose allgather asks first at 4.

    intra     . 1 . . . . . . . . . 1
    inter     . 0 0 0 0 0 0 1 1 1 1
    """
    trace = trace_of([(8, 1.0), (8, 1.0)], world=4, node=2)
    costs = Costs(nested_cluster_of(bytes_per_s=(16.0, 8.0)), codecs_of())
    timeline = simulate(units_with(trace, RS_AG, Option.parse("RS.intra AR.inter AG.intra")), trace, costs)
    assert work(timeline) == {
        (0, "RS.flat"): (1, 4),
        (1, "RS.intra"): (1, 2),
        (0, "AG.flat"): (4, 7),
        (1, "AR.inter"): (7, 11),
        (1, "AG.intra"): (11, 12),
    }


def test_both_links_slow_the_backward():
    """Contention 1/2 of each link: backward goes at 2/3 of its speed beside one and at 1/2 beside both."""
    trace = trace_of([(8, 1.0), (8, 1.0)], world=4, node=2, backward_s=6.0)
    costs = Costs(nested_cluster_of(bytes_per_s=(8.0, 32.0), contention=0.5), codecs_of())
    nested = Option.parse("RS.intra AR.inter AG.intra")
    # Links busy as in the picture above: one from 1 to 3, both from 3 to 4, one from 4 to 5, both from 5 to 6, one from 6 to 9.
    done_at_9 = 1 + 2 / 1.5 + 1 / 2 + 1 / 1.5 + 1 / 2 + 3 / 1.5
    timeline = simulate(units_with(trace, nested, nested), trace, costs)
    assert done_at_9 == 6.0
    assert timeline.backward_end_s == pytest.approx(9.0)


def test_stock_deepspeed_reduces_after_backward():
    trace = trace_of([(3, 1.0), (2, 2.0)], forward_s=1, after_s=1)
    costs = Costs(cluster_of(alpha_s=10), codecs_of())
    assert stock_time(trace, costs) == pytest.approx(1 + 2 + (10 + 5) + 1)
    assert stock_timeline(trace, costs).iteration_s == stock_time(trace, costs)
    large = trace_of([(500_000_001, 1.0), (7, 2.0)])
    assert stock_time(large, costs) == pytest.approx(2 + 20 + 500_000_008)


def test_walks_follow_the_rows_of_the_runtime():
    """Four ranks, 100 elements: shards of 25; payloads of a quarter of the raw bytes; seconds as counted by hand."""
    cluster = cluster_of(world=4)
    costs = Costs(cluster, codecs_of(encode=2.0, decode=1.0, share=1 / 4, sizes=(1, 1024)))

    def steps(text):
        walk = costs.walk(Option.parse(text), 100)
        return [step.seconds for step in walk.steps], walk.sent_bytes

    assert steps("AR.flat") == ([150], 600)
    assert steps("RS.flat AG.flat") == ([75, 75], 600)
    assert steps("RD.flat BC.flat") == ([100, 100], 600)
    assert steps("C.cpu AG.flat D.cpu") == ([200, 75, 400], 300)
    assert steps("RS.flat C.cpu AG.flat D.cpu") == ([75, 50, 18.75, 100], 300 + 75)
    assert steps("C.cpu A2A.flat D.cpu AG.flat") == ([200, 18.75, 100, 75], 75 + 300)
    assert steps("C.cpu A2A.flat D.cpu C.cpu AG.flat D.cpu") == ([200, 18.75, 100, 50, 18.75, 100], 75 + 75)
    assert steps("C.cpu A2A.flat AG.flat D.cpu") == ([200, 18.75, 75, 400], 75 + 300)
    assert steps("C.cpu GA.flat D.cpu C.cpu BC.flat D.cpu") == ([200, 75, 400, 200, 25, 100], 75 + 75)
    assert steps("C.cpu GA.flat BC.flat D.cpu") == ([200, 75, 100, 400], 75 + 300)
    assert steps("C.cpu AR.flat D.cpu") == ([200, 37.5, 100], 150)
    halved = Costs(cluster, codecs_of(), "bfloat16").walk(AR, 100)
    assert (halved.steps[0].seconds, halved.sent_bytes) == (75, 300)


def test_costs_go_through_the_samples_and_never_fall():
    samples = {"nbytes": (100, 200, 400), "seconds": (1.0, 2.8, 5.0), "alpha_s": 3.0, "beta_s_per_byte": 0.01, "fit_error": 0.1}
    routine = {"routine": "AR", "level": "flat", "ranks": 2, **samples}
    cluster = ClusterProfile(backend="gloo", hosts=("a", "b"), ranks_per_node=1, links={}, routines=(routine,))
    costs = Costs(cluster, codecs_of())
    times = {n: costs.comm(Task.ALLREDUCE, Level.FLAT, n) for n in (50, 100, 150, 200, 300, 400, 600)}
    assert times == pytest.approx({50: 1, 100: 1, 150: 1.9, 200: 2.8, 300: 3.9, 400: 5, 600: 7})


def test_what_was_not_measured_is_named():
    costs = Costs(cluster_of(traffic={"AR": lambda world, node: 1}), codecs_of())
    with pytest.raises(FileError, match=r"AG\.flat was not measured with 2 ranks.*espresso profile cluster"):
        costs.walk(GATHERED["cpu"], 100)
    with pytest.raises(FileError, match=r"device 'gpu' was not measured \(measured: cpu\).*espresso profile compressors"):
        costs.walk(GATHERED["gpu"], 100)
    with pytest.raises(FileError, match=r"wire_dtype is 'float23'.*float32"):
        Costs(cluster_of(), codecs_of(), "float23")
    with pytest.raises(FileError, match="do not ascend"):
        Costs(cluster_of(sizes=(4, 2)), codecs_of())


def test_chrome_trace_holds_every_span():
    trace = trace_of([(4, 2.0), (1, 4.0)], forward_s=1)
    timeline = simulate(units_with(trace, GATHERED["cpu"], AR), trace, plain_costs())
    events = [
        event
        for event in to_chrome({"a": stock_timeline(trace, plain_costs()), "b": timeline})["traceEvents"]
        if event["ph"] == "X" and event["pid"] == 1
    ]
    assert len(events) == len(timeline.spans)
    assert {(e["name"], e["ts"], e["dur"]) for e in events} >= {("C.cpu t0", 3e6, 2e6), ("AR.flat t1", 6e6, 1e6)}


def reference(walks, ready, backward_s, contention, link_contention, handling_s):
    """Step time from the start of backward, by lanes as workers that call back: written apart from the planner's loop."""
    heap, now, busy, ends = [], [0.0], dict.fromkeys(range(4)), {"backward": 0.0, "synced": 0.0}
    waiting, tickets = {resource: [] for resource in busy}, itertools.count()
    left = [list(walk) for walk in walks]
    routines = [sum(resource > 1 for resource, _ in walk) for walk in walks]
    expected = [
        [unit for unit, count in enumerate(routines) if count >= lane] for lane in range(9)
    ]  # lane by lane, in plan order
    arrived = [set() for _ in range(9)]
    inboxes = [[] for _ in range(9)]
    occupied = [False] * 9
    progress = {"at": 0.0, "done": 0.0, "next": 0, "version": 0}
    cpu = {"version": 0, "planned": 0.0, "finish": None}

    def later(when, call):
        heapq.heappush(heap, (when, next(tickets), call))

    def rate():
        links = bool(busy[2]) + bool(busy[3])
        return 0.0 if busy[0] else 1 / (1 + contention * bool(busy[1]) + link_contention * links)

    def aim():
        """Predict again when backward reaches the next unit; older predictions are void."""
        progress["version"] += 1
        version, goal = progress["version"], [*ready, backward_s][progress["next"]]
        if rate() > 0:
            later(max(now[0], now[0] + (goal - progress["done"]) / rate()), lambda: arrive(version))

    def account():
        progress["done"] += (now[0] - progress["at"]) * rate()
        progress["at"] = now[0]

    def arrive(version):
        if version != progress["version"]:
            return
        account()
        unit = progress["next"]
        progress["next"] += 1
        if unit == len(ready):
            ends["backward"] = now[0]
            progress["version"] += 1
            progress["next"] = None
            if busy[1]:
                finish, planned = cpu["finish"], cpu["planned"]
                cpu["version"] += 1
                own = cpu["version"]
                later(now[0] + (planned - now[0]) / (1 + contention), lambda: own == cpu["version"] and finish())
            return
        progress["done"] -= handling_s * routines[unit]
        aim()
        inboxes[0].append(unit)
        wake(0)

    def use(resource, seconds, then):
        waiting[resource].append((seconds, then))
        kick(resource)

    def kick(resource):
        if busy[resource] is None and waiting[resource]:
            account()
            seconds, then = waiting[resource].pop(0)
            busy[resource] = then

            def finish():
                account()
                busy[resource] = None
                kick(resource)
                then()
                if progress["next"] is not None:
                    account()
                    aim()

            if resource == 1:
                alone = progress["next"] is None
                cpu["planned"] = now[0] + (seconds if alone else seconds * (1 + contention))
                cpu["finish"] = finish
                cpu["version"] += 1
                own = cpu["version"]
                later(cpu["planned"], lambda: own == cpu["version"] and finish())
            else:
                later(now[0] + seconds, finish)
            if progress["next"] is not None:
                aim()

    def wake(lane):
        if not occupied[lane] and inboxes[lane]:
            occupied[lane] = True
            work_on(lane, inboxes[lane].pop(0))

    def work_on(lane, unit):
        if not left[unit]:
            ends["synced"] = max(ends["synced"], now[0])
        else:
            resource, seconds = left[unit].pop(0)
            if resource < 2:
                use(resource, seconds, lambda: work_on(lane, unit))
                return

            def hand_on():
                """To the next lane, unless an earlier unit is still to come there."""
                if not left[unit]:
                    ends["synced"] = max(ends["synced"], now[0])
                arrived[lane + 1].add(unit)
                while expected[lane + 1] and expected[lane + 1][0] in arrived[lane + 1]:
                    inboxes[lane + 1].append(expected[lane + 1].pop(0))
                wake(lane + 1)

            use(resource, seconds, hand_on)
        occupied[lane] = False
        wake(lane)

    aim()
    while heap:
        now[0], _, call = heapq.heappop(heap)
        call()
    return max(ends.values())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("make_case", [random_case, random_nested_case])
def test_an_independent_simulator_agrees(make_case, device):
    rng = random.Random(7)
    for _ in range(100):
        trace, cluster, codecs = make_case(rng, tensors=rng.randint(1, 9), device=device)
        costs = costs_of(trace, cluster, codecs)
        units = units_with(trace, *random_options(rng, trace, cluster))
        walks = [costs.walk(unit.option, unit.numel).lean for unit in units]
        slowed = costs.contention, costs.link_contention, costs.handling_s
        slow = reference(walks, [unit.ready_s for unit in units], trace.backward_s, *slowed)
        fast = iteration_time(units, trace, costs)
        assert fast == pytest.approx(trace.forward_s + slow + trace.after_s, rel=1e-9)
        assert simulate(units, trace, costs).iteration_s == pytest.approx(fast, rel=1e-12)


def random_options(rng, trace, cluster):
    """An option for each tensor; half the time few different ones, so that units meet in the same lanes."""
    devices = (Device.CPU,) if trace.device == "cpu" else (Device.GPU, Device.CPU)
    tree = allowed(option_tree(devices), Constraints(), cluster.nodes, cluster.ranks_per_node)
    few = rng.sample(tree, 3) if rng.random() < 0.5 else tree
    return [rng.choice(few) for _ in trace.tensors]


@pytest.mark.parametrize("make_case", [random_case, random_nested_case])
def test_spans_never_overlap_on_a_resource_and_keep_the_order_of_actions(make_case):
    rng = random.Random(3)
    for _ in range(60):
        trace, cluster, codecs = make_case(rng, tensors=6)
        units = units_with(trace, *random_options(rng, trace, cluster))
        timeline = simulate(units, trace, Costs(cluster, codecs))
        for resource in (Resource.CPU, *LINKS):
            spans = sorted((s.start_s, s.end_s) for s in timeline.spans if s.resource is resource)
            assert all(a[1] <= b[0] + 1e-12 for a, b in itertools.pairwise(spans))
        for number, unit in enumerate(units):
            mine = sorted((s for s in timeline.spans if s.unit == number), key=lambda s: s.start_s)
            assert [s.action for s in mine] == list(map(str, unit.option.actions))
            assert mine[0].start_s >= trace.forward_s + unit.ready_s - 1e-12
            assert all(a.end_s <= b.start_s + 1e-12 for a, b in itertools.pairwise(mine))
        for lane, link in itertools.product(range(4), LINKS):  # the order of collectives is that of the plan
            links = [[s for s in timeline.spans if s.unit == number and s.resource in LINKS] for number in range(len(units))]
            ordered = [sorted(mine, key=lambda s: s.start_s) for mine in links]
            starts = [mine[lane].start_s for mine in ordered if len(mine) > lane and mine[lane].resource is link]
            assert all(before < after for before, after in itertools.pairwise(starts))
        assert timeline.iteration_s >= trace.compute_s


@pytest.mark.parametrize("make_case", [random_case, random_nested_case])
def test_the_critical_path_is_the_whole_step_without_a_gap(make_case):
    rng = random.Random(13)
    for device in ("cpu", "cuda"):
        for _ in range(60):
            trace, cluster, codecs = make_case(rng, tensors=rng.randint(1, 8), device=device)
            timeline = simulate(units_with(trace, *random_options(rng, trace, cluster)), trace, Costs(cluster, codecs))
            path = timeline.critical_path
            assert (path[0].start_s, path[-1].end_s) == (0.0, timeline.iteration_s)
            assert all(before.end_s == after.start_s for before, after in itertools.pairwise(path))
            assert sum(s.end_s - s.start_s for s in path) == pytest.approx(timeline.iteration_s)
            busy = {(s.unit, s.action, s.end_s): s.start_s for s in timeline.spans if s.unit >= 0}
            assert all(busy[s.unit, s.action, s.end_s] == s.start_s for s in path if s.unit >= 0)


@given(
    rows=st.lists(st.tuples(st.integers(1, 10**6), st.floats(0.001, 0.1)), min_size=1, max_size=8),
    slower=st.floats(1.0, 50.0),
)
@settings(max_examples=60, deadline=None)
def test_a_slower_link_never_makes_the_step_shorter(rows, slower):
    """Of uncompressed plans, where it can be proved: with codecs in between, first come first served knows anomalies."""
    ready, tensors = 0.0, []
    for numel, gap in rows:
        ready += gap
        tensors.append((numel, ready))
    trace = trace_of(tensors)
    times = [
        iteration_time(singles(trace), trace, Costs(cluster_of(alpha_s=1e-4, bytes_per_s=1e8 / factor), codecs_of()))
        for factor in (1.0, slower)
    ]
    assert times[0] <= times[1] * (1 + 1e-12)


def fused(units, trace, cluster, codecs):
    """The units after `fuse`, among uncompressed ones and an allgather of payloads."""
    menu = small_menu(trace, cluster, codecs, [AR, RS_AG, GATHERED["cpu"]])
    trials = Trials(units, trace, menu)
    fuse(trials, Limits(trace, menu))
    return trials.units


def test_fusing_merges_only_neighbours_of_one_dtype_and_never_hurts():
    rng = random.Random(11)
    for _ in range(20):
        trace, cluster, codecs = random_case(rng, tensors=8)
        mixed = trace_of(
            [(t.numel, t.ready_s) for t in trace.tensors],
            world=trace.world_size,
            dtypes=[rng.choice(["float32", "bfloat16"]) for _ in trace.tensors],
        )
        costs = Costs(cluster, codecs)
        before = [Unit.of(mixed, i, i + 1, rng.choice([AR, RS_AG, GATHERED["cpu"]])) for i in range(8)]
        after = fused(before, mixed, cluster, codecs)
        assert iteration_time(after, mixed, costs) <= iteration_time(before, mixed, costs) * (1 + 1e-8)
        assert [i for u in after for i in range(u.start, u.stop)] == list(range(8))
        assert after == [Unit.of(mixed, u.start, u.stop, u.option, u.codec) for u in after]
        assert all(len({t.dtype for t in mixed.tensors[u.start : u.stop]}) == 1 for u in after)
        assert after == fused(before, mixed, cluster, codecs)


def test_latency_is_why_units_are_fused():
    """Ten tiny tensors at once, a millisecond of latency each: one buffer."""
    trace = trace_of([(10, 1.0)] * 10)
    assert len(fused(singles(trace), trace, cluster_of(alpha_s=1e-3, bytes_per_s=1e9), codecs_of())) == 1


def test_a_unit_has_one_dtype():
    trace = trace_of([(1, 1.0), (1, 2.0)], dtypes=["float32", "bfloat16"])
    with pytest.raises(FileError, match=r"'t0' \(float32\) and 't1' \(bfloat16\) cannot share a unit"):
        Unit.of(trace, 0, 2)


def test_only_measured_devices_that_training_has_are_used():
    trace = trace_of([(1, 1.0)])
    with pytest.raises(FileError, match="measured on gpu, but the model was traced on cpu"):
        menu_of(trace, cluster_of(), codecs_of(device="gpu"))
    choices = menu_of(trace, cluster_of(), codecs_of()).choices
    assert {action.at for choice in choices for action in choice.option.actions} == {Device.CPU, Level.FLAT}
    assert len(menu_of(trace, cluster_of(), codecs_of(summable=True)).choices) == 13


def test_a_disturbed_sample_is_lowered_to_its_neighbours():
    assert undisturbed((10, 20, 40), (1.0, 5.0, 4.0)) == (1.0, 2.0, 4.0)
    assert undisturbed((10, 20, 40), (1.0, 2.4, 4.0)) == (1.0, 2.4, 4.0)
    assert undisturbed((10, 20), (5.0, 1.0)) == (5.0, 1.0)
