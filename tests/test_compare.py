"""`espresso compare`: runs made from the predicted timeline, as they are and disturbed, beside the plan."""

import itertools
import json
import random
from collections import Counter

import pytest
from profile_files import NAMES, planned, slow_case

from espresso_ds.cli import main
from espresso_ds.core.errors import FileError, MismatchError
from espresso_ds.core.option import UNCOMPRESSED, Option
from espresso_ds.core.plan import Plan, load_plan_file, save_plan_file
from espresso_ds.core.profile import ClusterProfile, CompressorProfile, ModelTrace
from espresso_ds.core.record import fingerprint
from espresso_ds.core.run_trace import Mark, RunSpan, RunStep, RunTrace, run_units
from espresso_ds.planner.build import in_wire_order, make_plan, timelines_of, units_of
from espresso_ds.planner.chrome import to_chrome
from espresso_ds.planner.compare import compare
from espresso_ds.planner.cost import LINKS, Costs, Resource
from espresso_ds.planner.measured import at_work, measured_timeline, median_step, since_last_step
from espresso_ds.planner.step_prediction import step_prediction
from espresso_ds.planner.timeline import simulate

PACKED = "C.cpu A2A.flat D.cpu C.cpu AG.flat D.cpu"
ROUNDED = 1e-5  # a dozen numbers, each to the microsecond


@pytest.fixture
def slow(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return slow_case(tmp_path)


def profiles_of(folder):
    """In the order in which the plan has the tensors."""
    beside = folder / "plan.profiles"
    trace = in_wire_order(ModelTrace.load(beside / "trace.json"))
    return trace, ClusterProfile.load(beside / "cluster.json"), CompressorProfile.load(beside / "compressors.json")


def timeline_of(plan, folder):
    return timelines_of(plan, *profiles_of(folder))["planned"]


def chunked_plan(folder):
    """All in two units of many chunks, with a compression at each site, in the plan's file."""
    planned(folder)
    config, block, plan = load_plan_file(folder / "plan.json")
    tensors = [
        tensor.model_copy(update={"option": PACKED, "chunk_numel": 300_000, "unit": int(place > 2), "codec": 0})
        for place, tensor in enumerate(plan.tensors)
    ]
    plan = plan.model_copy(update={"tensors": tuple(tensors)})
    trace, cluster, codecs = profiles_of(folder)
    step = step_prediction(units_of(plan, trace), trace, Costs(cluster, codecs, trace.wire_dtype))
    plan = plan.model_copy(update={"step": step}).sealed()
    save_plan_file(folder / "plan.json", config, block, plan)
    return plan


def spans_of(plan, timeline):
    """The predicted step as the recorder would have seen it, had the run gone as predicted."""
    after = timeline.iteration_s - timeline.synced_s
    spans = []
    for unit, ready in enumerate(timeline.ready_s):
        mine = sorted((s.start_s + after, s.end_s + after) for s in timeline.spans if s.unit == unit)
        spans += [RunSpan(unit, number, start, end) for number, (start, end) in enumerate(mine)]
        moments = {Mark.READY: ready + after, Mark.SUBMITTED: ready + after, Mark.DONE: mine[-1][1]}
        spans += [RunSpan(unit, mark, at, at) for mark, at in moments.items()]
    spans.append(RunSpan(-1, Mark.FLUSH, timeline.backward_end_s + after, timeline.synced_s + after))
    return spans


def run_of(plan, steps, nodes=2, device="cpu"):
    """A run of these steps' spans."""
    return RunTrace(
        made_by="tests",
        plan=plan.seal,
        rank=0,
        world_size=2,
        nodes=nodes,
        device=device,
        units=run_units(plan),
        steps=[RunStep(step=number, spans=spans) for number, spans in enumerate(steps, 5)],
    )


def delayed(spans, unit, action, seconds):
    """One action takes longer, and so the unit is done later."""
    return [
        span._replace(start_s=span.start_s + seconds * (span.action == Mark.DONE), end_s=span.end_s + seconds)
        if span.unit == unit and span.action in (action, Mark.DONE)
        else span
        for span in spans
    ]


def first_encoding(plan):
    """The first compressed one of the run's units, and the number of its first compression."""
    options = [unit.option.split() for unit in run_units(plan)]
    unit = next(number for number, words in enumerate(options) if "C.cpu" in words)
    return unit, options[unit].index("C.cpu")


@pytest.mark.parametrize("make", [planned, chunked_plan])
def test_a_run_that_goes_as_predicted_has_no_differences(slow, make):
    plan = make(slow)
    timeline = timeline_of(plan, slow)
    found = compare(plan, run_of(plan, [spans_of(plan, timeline)] * 3), "plan.json", "run.json")
    assert found.steps == 3 and len(found.units) == len(plan.units())
    for pair in (found.step, found.backward_end, found.exposed, found.codec, found.links):
        assert pair.measured_s == pytest.approx(pair.predicted_s, abs=ROUNDED)
    assert min(found.step.predicted_s, found.backward_end.predicted_s, found.links.predicted_s, found.codec.predicted_s) > 0
    assert found.step.predicted_s == pytest.approx(timeline.iteration_s, abs=ROUNDED)
    assert found.exposed.predicted_s == pytest.approx(timeline.exposed_s, abs=ROUNDED)
    of_links = sum(s.end_s - s.start_s for s in timeline.spans if s.resource in LINKS)
    of_codecs = sum(s.end_s - s.start_s for s in timeline.spans if s.unit >= 0 and s.resource not in LINKS)
    assert (found.links.predicted_s, found.codec.predicted_s) == pytest.approx((of_links, of_codecs), abs=ROUNDED)
    for unit in found.units:
        assert unit.work.ratio == pytest.approx(1, rel=1e-3)
        for pair in (unit.ready, unit.done, *unit.actions):
            assert pair.measured_s == pytest.approx(pair.predicted_s, abs=ROUNDED)
        assert unit.done.predicted_s > unit.ready.predicted_s > 0
        assert " ".join(action.action for action in unit.actions) == unit.option
    in_order = [unit.tensors for unit in sorted(found.units, key=lambda unit: unit.unit)]
    assert in_order == [tuple(tensor.name for tensor in group) for group in plan.units()]


def test_what_a_plan_keeps_is_its_timeline(slow):
    """Against the timeline itself, with the contentions that delay when gradients become ready."""
    plan = chunked_plan(slow)
    trace, cluster, codecs = profiles_of(slow)
    timeline = simulate(units_of(plan, trace), trace, Costs(cluster, codecs, trace.wire_dtype))
    undisturbed = [trace.forward_s + unit.ready_s for unit in units_of(plan, trace)]
    assert plan.step.units[0].ready_s == pytest.approx(undisturbed[0], abs=1e-6)
    assert plan.step.units[1].ready_s > undisturbed[1] + 1e-3  # the codec's work on the CPU slowed the backward down
    assert plan.step.units[1].done_s == pytest.approx(timeline.synced_s, abs=1e-6)
    assert plan.step.backward_end_s == pytest.approx(timeline.backward_end_s, abs=1e-6)
    (first, *_) = plan.units()
    count = sum(unit.unit == 0 for unit in run_units(plan))
    assert count > 1 and sum(tensor.numel for tensor in first) > first[0].chunk_numel
    for place, action in enumerate(Option.parse(PACKED).actions):
        whole = [s for s in timeline.spans if 0 <= s.unit < count and s.action == str(action)]
        if Counter(PACKED.split())[str(action)] == 1:
            assert plan.step.units[0].actions_s[place] == pytest.approx(sum(s.end_s - s.start_s for s in whole), abs=ROUNDED)


def test_predictions_are_rounded_and_small(slow):
    plan = planned(slow)
    text = plan.step.model_dump_json()
    assert len(text) < 150 * (len(plan.units()) + 1)
    numbers = [n for unit in plan.step.units for n in (unit.ready_s, unit.done_s, *unit.actions_s)]
    assert all(number == round(number, 6) for number in numbers) and max(numbers) > 0


@pytest.mark.parametrize("make", [planned, chunked_plan])
def test_the_unit_that_took_longer_comes_first(slow, make):
    plan = make(slow)
    spans = spans_of(plan, timeline_of(plan, slow))
    for place in (0, len(run_units(plan)) - 1):
        unit = run_units(plan)[place]
        routine = next(n for n, word in enumerate(unit.option.split()) if word.endswith(".flat"))
        late = compare(plan, run_of(plan, [delayed(spans, place, routine, 0.25)]), "plan.json", "run.json")
        assert late.units[0].unit == unit.unit
        assert late.units[0].done.difference_s >= 0
        codec = compare(plan, run_of(plan, [delayed(spans, place, 0, 0.25)]), "plan.json", "run.json")
        assert codec.units[0].unit == unit.unit
    compressed, encoding = first_encoding(plan)
    slower = compare(plan, run_of(plan, [delayed(spans, compressed, encoding, 0.25)]), "plan.json", "run.json")
    top = slower.units[0]
    assert top.unit == run_units(plan)[compressed].unit
    assert top.actions[encoding].difference_s == pytest.approx(0.25, abs=ROUNDED)
    assert (top.codec.difference_s, top.work.difference_s) == pytest.approx((0.25, 0.25), abs=ROUNDED)
    assert all(abs(unit.work.difference_s) < ROUNDED for unit in slower.units[1:])


def test_medians_leave_one_bad_step_out(slow):
    plan = planned(slow)
    spans = spans_of(plan, timeline_of(plan, slow))
    flush = spans[-1]
    slowly = [*delayed(spans[:-1], 0, 0, 9.0), flush._replace(end_s=flush.end_s + 9.0)]
    found = compare(plan, run_of(plan, [spans, slowly, spans]), "plan.json", "run.json")
    assert found.step.difference_s == pytest.approx(0, abs=ROUNDED)
    assert all(abs(unit.work.difference_s) < ROUNDED for unit in found.units)
    assert median_step(run_of(plan, [slowly, spans, slowly])).seconds == pytest.approx(flush.end_s + 9.0)
    assert median_step(run_of(plan, [slowly, spans])).step == 5


def test_copies_are_work_that_nobody_predicted(slow):
    plan = planned(slow)
    spans = spans_of(plan, timeline_of(plan, slow))
    copies = [RunSpan(0, Mark.COPY_IN, 0.0, 0.03), RunSpan(0, Mark.COPY_OUT, 1.0, 1.05)]
    found = compare(plan, run_of(plan, [[*spans, *copies]]), "plan.json", "run.json")
    assert found.units[0].unit == 0 and found.units[0].copies_s == pytest.approx(0.08) and found.copies_s == pytest.approx(0.08)
    assert found.units[0].work.difference_s == pytest.approx(0.08, abs=ROUNDED)
    assert found.codec.difference_s == pytest.approx(0, abs=ROUNDED)


@pytest.mark.parametrize("seed", range(20))
def test_a_link_serves_who_asked_first_and_its_seconds_add_up(slow, seed):
    """Against a count of millisecond slots, each of which belongs to the routine under way that was issued first."""
    rng = random.Random(seed)
    plan = planned(slow, "--uncompressed")
    units = [unit for unit in run_units(plan) for _ in range(4)]
    intervals = []
    for _ in units:
        start = rng.randrange(60)
        intervals.append((start, start + rng.randrange(40)))
    option = str(UNCOMPRESSED)
    run = run_of(plan, []).model_copy(update={"units": tuple(u.model_copy(update={"option": option}) for u in units)})
    spans = [RunSpan(unit, 0, start / 1e3, end / 1e3) for unit, (start, end) in enumerate(intervals)]
    step = RunStep(step=1, spans=[*spans, RunSpan(-1, Mark.FLUSH, 0.0, 1.0)])
    slots = Counter()
    for slot in range(100):
        under_way = [(interval, unit) for unit, interval in enumerate(intervals) if interval[0] <= slot < interval[1]]
        if under_way:
            slots[min(under_way)[1]] += 1
    found = {work.unit: work.end_s - work.start_s for work in at_work(run, step)}
    assert found == pytest.approx({unit: slots[unit] / 1e3 for unit in range(len(units))}, abs=1e-12)
    assert sum(found.values()) == pytest.approx(slots.total() / 1e3)


def test_places_of_work_are_those_of_the_model(slow):
    plan = chunked_plan(slow)
    spans = [*spans_of(plan, timeline_of(plan, slow)), RunSpan(0, Mark.COPY_IN, 0.0, 0.1)]
    for nodes, device, link, copies in ((2, "cpu", Resource.INTER, Resource.CPU), (1, "cuda", Resource.INTRA, Resource.COMPUTE)):
        run = run_of(plan, [spans], nodes, device)
        works = at_work(run, run.steps[0])
        words = PACKED.split()
        assert {w.resource for w in works if w.action >= 0 and words[w.action].endswith(".flat")} == {link}
        assert {w.resource for w in works if w.action >= 0 and words[w.action].endswith(".cpu")} == {Resource.CPU}
        assert {w.resource for w in works if w.action < 0} == {copies}


def refused(plan, run, kind, says):
    with pytest.raises(kind, match=says):
        compare(plan, run, "plan.json", "run.json")


def test_what_does_not_belong_together_is_refused(slow):
    plan = planned(slow)
    spans = spans_of(plan, timeline_of(plan, slow))
    run = run_of(plan, [spans])
    other = run.model_copy(update={"plan": "0123456789abcdef"})
    refused(plan, other, MismatchError, f"run.json was recorded .* seal 0123456789abcdef, plan.json has seal {plan.seal}")
    without = plan.model_copy(update={"step": None}).sealed()
    refused(without, run, FileError, "plan.json: holds no prediction")
    fewer = plan.model_copy(update={"step": plan.step.model_copy(update={"units": plan.step.units[1:]})})
    refused(fewer, run, FileError, "plan.json: its predictions are of other units")
    refused(plan, run_of(plan, []), FileError, "run.json: holds no whole step")
    refused(plan, run.model_copy(update={"units": run.units[:-1]}), FileError, "run.json: its units are not those of plan.json")
    never_done = [span for span in spans if not (span.unit == 0 and span.action == Mark.DONE)]
    refused(plan, run_of(plan, [never_done]), FileError, f"step 5 has no ready or no done of '{plan.units()[0][0].name}")


def test_plans_without_predictions_keep_their_seals(slow):
    plan = planned(slow)
    old = plan.model_dump(mode="json", exclude={"seal": True, "step": True, "pipeline": True, "made_for": {"cluster": True}})
    read = Plan.from_json({**old, "seal": fingerprint(old)}, "plan.json")
    read.check("plan.json")
    changed = plan.model_copy(update={"step": plan.step.model_copy(update={"after_s": 9.0})})
    with pytest.raises(FileError, match="edited"):
        changed.check("plan.json")


def test_predicted_and_measured_open_side_by_side(slow):
    """A run that goes as predicted has the very same events, but for what only the prediction knows of the model's own."""
    plan = planned(slow)
    timeline = since_last_step(timeline_of(plan, slow))
    run = run_of(plan, [spans_of(plan, timeline_of(plan, slow))])
    events = to_chrome({"predicted": timeline, "measured": measured_timeline(run, run.steps[0])})["traceEvents"]

    def of(pid):
        return [event for event in events if event["pid"] == pid]

    def shape(pid, unit):
        return sorted(
            (e["tid"], e["cat"], e["args"]["action"], e["args"]["unit"], round(e["ts"]), round(e["dur"]))
            for e in of(pid)
            if e["ph"] == "X" and (e["args"]["unit"] >= 0) == unit
        )

    assert shape(0, True) == shape(1, True) and shape(0, True)
    assert {word for _, _, word, *_ in shape(0, False)} == {"optimizer", "forward", "backward"}
    assert [(tid, word, ts) for tid, _, word, _, ts, _ in shape(1, False)] == [(0, "model", 0)]
    assert {e["name"] for e in of(1)} >= {"process_name", "thread_name"}
    threads = [[(e["tid"], e["args"]["name"]) for e in of(pid) if e["name"] == "thread_name"] for pid in (0, 1)]
    assert threads[0] == threads[1] == [(int(r), r.name.lower()) for r in Resource]
    for event in events:
        assert set(event) == ({"ph", "name", "pid", "args"} | ({"tid"} if event["name"] == "thread_name" else set())) or set(
            event
        ) == {"ph", "name", "cat", "pid", "tid", "ts", "dur", "args"}
    assert {frozenset(e["args"]) for e in events if e["ph"] == "X"} == {frozenset({"unit", "tensor", "action"})}
    assert timeline.iteration_s == pytest.approx(timeline_of(plan, slow).iteration_s)
    assert timeline.exposed_s == pytest.approx(timeline_of(plan, slow).exposed_s)


def test_work_that_overlaps_goes_to_threads_of_the_same_name(slow):
    plan = planned(slow)
    spans = spans_of(plan, timeline_of(plan, slow))
    copies = [RunSpan(0, Mark.COPY_IN, n / 10, n / 10 + 0.15) for n in range(6)]
    whole = RunSpan(-1, Mark.BACKWARD, 0.06, spans[-1].start_s)
    run = run_of(plan, [[*spans, *copies, whole]])
    events = to_chrome({"measured": measured_timeline(run, run.steps[0])})["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert Counter(names.values())["cpu"] >= 2
    for tid, name in names.items():
        mine = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X" and e["tid"] == tid)
        assert all(one[1] <= other[0] + 1e-2 for one, other in itertools.pairwise(mine)), name
    assert {"forward", "backward"} <= {event["name"] for event in events} and "model" not in {e["name"] for e in events}


def written(folder, plan, steps=3):
    spans = spans_of(plan, timeline_of(plan, folder))
    compressed, encoding = first_encoding(plan)
    run_of(plan, [delayed(spans, compressed, encoding, 0.2)] * steps).save(folder / "run.json")
    return run_units(plan)[compressed].unit


def compared(capsys, folder, *more):
    capsys.readouterr()
    main(["compare", str(folder / "plan.json"), str(folder / "run.json"), *map(str, more)])
    return capsys.readouterr().out


def test_the_tables(slow, capsys):
    plan = planned(slow)
    unit = written(slow, plan)
    said = compared(capsys, slow)
    assert "Medians of 3 steps on rank 0 of 2" in said and "waits for slower ranks" in " ".join(said.split())
    for row in ("step", "waiting for synchronisation", "codec work", "links at work", "copies"):
        assert row in said
    assert f"{plan.predicted.planned_s * 1e3:.1f}" in said
    rows = said.partition("Units, the largest")[2].splitlines()
    first = next(row for row in rows if row.split() and row.split()[0].isdigit())
    assert first.split()[:2] == [str(unit), plan.units()[unit][0].name]
    assert first.rstrip().endswith("+200.0") and "/" in first
    assert all(tensor.name in said for tensor in plan.tensors if tensor.name == plan.units()[tensor.unit][0].name)
    few = compared(capsys, slow, "--top", 1)
    assert f"1 of {len(plan.units())} units are shown" in few and "units are shown" not in said
    assert "host" not in said
    run = RunTrace.load(slow / "run.json").model_copy(update={"device": "cuda"})
    run.save(slow / "run.json")
    assert "The clock is the host's" in compared(capsys, slow)


def test_json_holds_all_units(slow, capsys):
    plan = planned(slow)
    unit = written(slow, plan)
    shown = json.loads(compared(capsys, slow, "--json", "--top", 1))
    assert (shown["plan"], shown["steps"], len(shown["units"])) == (plan.seal, 3, len(plan.units()))
    assert shown["units"][0]["unit"] == unit and {n for u in shown["units"] for n in u["tensors"]} == set(NAMES)
    encoding = shown["units"][0]["actions"][first_encoding(plan)[1]]
    assert encoding["measured_s"] - encoding["predicted_s"] == pytest.approx(0.2, abs=ROUNDED) and encoding["codec"]


def test_pictures_and_traces_are_written(slow, capsys):
    plan = planned(slow)
    written(slow, plan)
    files = slow / "both.json", slow / "both.png"
    said = compared(capsys, slow, "--chrome", files[0], "--picture", files[1])
    assert all(str(file) in said for file in files)
    assert files[1].read_bytes().startswith(b"\x89PNG")
    events = json.loads(files[0].read_text())["traceEvents"]
    titles = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert titles == ["predicted", "measured (rank 0, step 5)"]
    with pytest.raises(SystemExit, match=r"trace\.json: no such model trace"):
        compared(capsys, slow, "--chrome", files[0], "--profiles", slow / "nowhere")


def test_faults_are_one_line(slow, capsys):
    plan = planned(slow)
    written(slow, plan)
    planned(slow, "--uncompressed")
    with pytest.raises(SystemExit, match=rf"espresso: .*run\.json was recorded under the plan with seal {plan.seal}") as stopped:
        compared(capsys, slow)
    assert "\n" not in stopped.value.code
    with pytest.raises(SystemExit):
        compared(capsys, slow, "--top", 0)
    assert "show at least one unit" in capsys.readouterr().err


def test_plans_of_hierarchical_options_hold_predictions_too(tmp_path):
    from planner_cases import codecs_of, nested_cluster_of
    from profile_files import named_trace

    cluster = nested_cluster_of(nodes=2, node=2, alpha_s=(1e-5, 1e-3), bytes_per_s=(25e9, 5e6))
    trace = named_trace(world=4, node=2)
    plan = make_plan(trace, cluster, codecs_of(encode=2e-9, decode=1e-9, share=0.02), made_by="tests")
    assert any(word.endswith(".inter") for tensor in plan.tensors for word in tensor.option.split())
    assert [len(unit.actions_s) for unit in plan.step.units] == [len(group[0].option.split()) for group in plan.units()]
    assert plan.step.synced_s + plan.step.after_s == pytest.approx(plan.predicted.planned_s, abs=ROUNDED)
