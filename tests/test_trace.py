"""The recorder of the runtime's spans and the run trace file: what is kept, in which order, and what is refused."""

import itertools
import json
import threading
import tracemalloc

import pytest
import torch
from plans import PREDICTION
from ranks import DEADLINE_S, Cluster

from espresso_ds.compressors import registry
from espresso_ds.core.config import CompressorSettings
from espresso_ds.core.errors import FileError
from espresso_ds.core.option import Option
from espresso_ds.core.plan import MadeFor, Plan, TensorDecision
from espresso_ds.core.run_trace import Mark, RunTrace, run_units
from espresso_ds.feedback import Feedback
from espresso_ds.runtime.executor import Compressor, Executor, Unit
from espresso_ds.runtime.lanes import Lanes
from espresso_ds.runtime.synchroniser import Member, Scaling, Synchroniser
from espresso_ds.runtime.trace import Recorder, Writer, run_trace, wanted_path

SECOND = 10**9
PACKED = "C.cpu A2A.flat D.cpu C.cpu AG.flat D.cpu"


def plan_of(rows) -> Plan:
    """A plan of (name, numel, option, unit, chunk_numel)."""
    tensors = [
        TensorDecision(name=name, shape=(n,), dtype="float32", numel=n, option=option, unit=unit, chunk_numel=chunk)
        for name, n, option, unit, chunk in rows
    ]
    made_for = MadeFor(nodes=1, ranks_per_node=2, model="m", config={})
    compressors = (CompressorSettings(name="topk", density=0.5),)
    return Plan(
        made_by="tests", made_for=made_for, profiles={}, compressors=compressors, predicted=PREDICTION, tensors=tensors
    ).sealed()


PLAN = plan_of([("a", 4, "AR.flat", 0, None), ("b", 3, PACKED, 1, 4), ("c", 7, PACKED, 1, 4)])


def record_step(recorder, step, begin_ns, units=(0, 1, 2, 3)):
    """One second: units become ready one after the other, lane 0 starts each, lane 1 ends it, then the flush."""
    for place, unit in enumerate(units):
        at = begin_ns + place * 1000
        recorder.training.span(step, unit, Mark.READY, at, at)
        recorder.lane(0).span(step, unit, 0, at, at + 500)
        recorder.lane(1).span(step, unit, Mark.DONE, at + 900, at + 900)
    recorder.training.span(step, -1, Mark.FLUSH, begin_ns + SECOND // 2, begin_ns + SECOND)


def test_the_last_whole_steps_are_kept_in_order_however_long_the_run_was():
    recorder = Recorder(2, 4, steps=3)
    size = recorder.nbytes
    for step in range(50):
        record_step(recorder, step, step * SECOND)
    steps = recorder.steps()
    assert [step.step for step in steps] == [47, 48, 49]
    assert recorder.nbytes == size
    for step in steps:
        assert step.seconds == 1.0
        assert [span.end_s for span in step.spans] == sorted(span.end_s for span in step.spans)
        assert [(s.unit, s.start_s, s.end_s) for s in step.spans if s.action == 0] == [
            (u, round(u * 1e-6, 9), round(u * 1e-6 + 5e-7, 9)) for u in range(4)
        ]
        assert sum(span.action == Mark.DONE for span in step.spans) == sum(span.action == Mark.READY for span in step.spans) == 4
        assert step.whole(Mark.FLUSH) == (-1, Mark.FLUSH, 0.5, 1.0)


@pytest.mark.parametrize("steps", [0, 1])
def test_the_first_step_only_sets_the_clock(steps):
    recorder = Recorder(2, 4)
    for step in range(steps):
        record_step(recorder, step, step * SECOND)
    assert recorder.steps() == ()


def test_a_step_of_which_a_ring_has_lost_records_is_left_out():
    """With more records than were reckoned with, one lane wraps around before the others."""
    recorder = Recorder(2, 4, steps=4)
    for step in range(5):
        record_step(recorder, step, step * SECOND)
        for _ in range(40):
            recorder.lane(0).span(step, 0, 0, step * SECOND, step * SECOND + 1)
    steps = recorder.steps()
    assert 0 < len(steps) < 4 and steps[-1].step == 4
    assert all(sum(span.action == 0 for span in step.spans) == 44 for step in steps)


def test_a_step_under_way_and_gaps_between_steps_are_left_out():
    recorder = Recorder(2, 4)
    for step in (0, 1, 2, 5, 6):
        record_step(recorder, step, step * SECOND)
    recorder.training.mark(Mark.READY, 7, 0)
    assert [step.step for step in recorder.steps()] == [1, 2, 6]


def test_of_very_many_units_fewer_steps_are_kept():
    units = 20_000
    recorder = Recorder(2, units)
    assert recorder.nbytes < 3 * 4 * 2**20
    for step in range(9):
        record_step(recorder, step, step * SECOND, range(units))
    steps = recorder.steps()
    assert [step.step for step in steps] == [3, 4, 5, 6, 7, 8]
    assert all(len(step.spans) == 3 * units + 1 for step in steps)


def test_threads_write_while_another_reads():
    """Every record read is one that was written, whole, and a step that is given out has all records of all lanes."""
    lanes, units, count = 3, 5, 400
    recorder = Recorder(lanes, units, steps=4)
    barrier = threading.Barrier(lanes + 1, timeout=60)

    def write(lane):
        for step in range(count):
            for unit in range(units):
                recorder.lane(lane).span(step, unit, lane, step * SECOND + unit, step * SECOND + 7 * unit)
            barrier.wait()
            barrier.wait()

    threads = [threading.Thread(target=write, args=(lane,), daemon=True) for lane in range(lanes)]
    for thread in threads:
        thread.start()
    seen = set()
    for step in range(count):
        _check_whole(recorder.steps(), lanes, units)  # while the lanes write
        barrier.wait()
        recorder.training.span(step, -1, Mark.FLUSH, step * SECOND, (step + 1) * SECOND)
        found = recorder.steps()
        _check_whole(found, lanes, units)
        seen |= {step.step for step in found}
        barrier.wait()
    for thread in threads:
        thread.join(60)
    assert seen == set(range(1, count))


def _check_whole(steps, lanes, units):
    for step in steps:
        spans = sorted(span for span in step.spans if span.unit >= 0)
        assert spans == [(u, lane, round(u * 1e-9, 9), round(7 * u * 1e-9, 9)) for u in range(units) for lane in range(lanes)]


def test_writing_allocates_nothing_in_the_long_run():
    writer = Writer(64)
    numbers = range(100)

    def write():
        for number in numbers:
            writer.span(number, number, 1, number, number)

    write()
    tracemalloc.start()
    try:
        write()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(50):
            write()
        assert tracemalloc.get_traced_memory()[0] - before < 200
    finally:
        tracemalloc.stop()


def test_marks_end_now():
    writer = Writer(8)
    writer.mark(Mark.READY, 3, 2)
    writer.mark(Mark.FLUSH, 3, start_ns=5)
    (ready, flush), _ = writer.read()
    assert (ready["unit"], ready["action"]) == (2, Mark.READY) and ready["start"] == ready["end"] > 0
    assert (flush["unit"], flush["action"], flush["start"]) == (-1, Mark.FLUSH, 5) and flush["end"] >= ready["end"]


def recorded():
    recorder = Recorder(2, len(run_units(PLAN)))
    for step in range(3):
        record_step(recorder, step, step * SECOND)
    return run_trace(recorder, PLAN, rank=1, device="cpu", made_by="tests")


def test_units_are_the_plans_and_their_chunks():
    assert [(unit.label, unit.unit, unit.numel) for unit in run_units(PLAN)] == [
        ("a", 0, 4),
        ("b (+1) [0]", 1, 4),
        ("b (+1) [1]", 1, 4),
        ("b (+1) [2]", 1, 2),
    ]
    assert [unit.codec for unit in run_units(PLAN)][:2] == [None, PLAN.compressors[0].label]
    assert run_units(PLAN)[2].tensors == ("b", "c")


def test_the_file_reads_back_as_it_was(tmp_path):
    run = recorded()
    assert (run.plan, run.rank, run.world_size, run.clock) == (PLAN.seal, 1, 2, "host") and len(run.steps) == 2
    run.save(tmp_path / "run.json")
    assert RunTrace.load(tmp_path / "run.json") == run


def edit(path, value):
    def change(run):
        place = run
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        return run

    return change


SPANS = ("steps", 0, "spans")
BAD = {
    "unknown key": (edit(["colour"], 1), "unknown key 'colour'"),
    "newer": (edit(["schema_version"], 2), "knows up to 1"),
    "no run trace": (lambda run: {"plan": 1}, "not a run trace"),
    "a list": (lambda run: [run], "a run trace is a JSON object"),
    "rank": (edit(["rank"], 2), "rank 2 is not one of 2 ranks"),
    "no such unit": (edit([*SPANS, 0], [4, 0, 0.0, 1.0]), "of no unit"),
    "whole step of a unit": (edit([*SPANS, 0], [1, int(Mark.BACKWARD), 0.0, 1.0]), "of no unit"),
    "action of no unit": (edit([*SPANS, 0], [-1, 0, 0.0, 1.0]), "of no unit"),
    "no such action": (edit([*SPANS, 0], [0, 1, 0.0, 1.0]), "no action of its unit's option"),
    "no such mark": (edit([*SPANS, 0], [0, -9, 0.0, 1.0]), "no action of its unit's option"),
    "backwards": (edit([*SPANS, 0], [0, 0, 1.0, 0.5]), "ends before it starts"),
    "too short": (edit([*SPANS, 0], [0, 0, 1.0]), "steps.0.spans.0"),
    "no flush": (edit(SPANS, []), "step 1 has no flush"),
    "no option": (edit(["units", 0, "option"], "AR.here"), "unknown place"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_file_is_one_clear_line(tmp_path, fault):
    change, says = BAD[fault]
    file = tmp_path / "run.json"
    file.write_text(json.dumps(change(json.loads(recorded().model_dump_json()))))
    with pytest.raises(FileError, match=says) as error:
        RunTrace.load(file)
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "says"), [("", "is empty"), ('{"schema_version": 1,', "is torn"), (None, "no such run trace")])
def test_a_torn_or_missing_file_says_how_to_make_one(tmp_path, text, says):
    file = tmp_path / "run.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(FileError, match=f"{says}.*ESPRESSO_TRACE_RUN="):
        RunTrace.load(file)


def test_who_writes_and_where(tmp_path, monkeypatch):
    monkeypatch.delenv("ESPRESSO_TRACE_RUN", raising=False)
    assert wanted_path(0) is None
    monkeypatch.setenv("ESPRESSO_TRACE_RUN", str(tmp_path / "run.json"))
    assert wanted_path(0) == tmp_path / "run.json" and wanted_path(1) is None
    monkeypatch.setenv("ESPRESSO_TRACE_RUN", str(tmp_path / "run-{rank}.json"))
    assert [wanted_path(rank) for rank in range(2)] == [tmp_path / f"run-{rank}.json" for rank in range(2)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ESPRESSO_TRACE_RUN", "run.json")
    assert wanted_path(0) == tmp_path / "run.json"
    for bad in (tmp_path, tmp_path / "no" / "run.json"):
        monkeypatch.setenv("ESPRESSO_TRACE_RUN", str(bad))
        with pytest.raises(FileError, match="ESPRESSO_TRACE_RUN="):
            wanted_path(0)


RUN = plan_of(
    [("a", 6, "AR.flat", 0, None), ("b", 40, PACKED, 1, 48), ("c", 60, PACKED, 1, 48), ("d", 9, "RS.flat AG.flat", 2, None)]
)


def train(groups, steps=4):
    """A rank's own synchroniser, lanes and executor; its run trace."""
    params = {t.name: torch.nn.Parameter(torch.zeros(t.numel)) for t in RUN.tensors}
    pieces = [Unit(n, u.label, u.numel, Option.parse(u.option)) for n, u in enumerate(run_units(RUN))]
    units = [
        ([p for p, u in zip(pieces, run_units(RUN), strict=True) if u.unit == n], [Member(t.name, params[t.name]) for t in group])
        for n, group in enumerate(RUN.units())
    ]
    recorder = Recorder(3, len(pieces))
    codec = registry.make(CompressorSettings(name="identity"))
    executor = Executor(pieces, [Compressor(codec, Feedback("none"), 7)], groups, torch.float32, "cpu", recorder)
    lanes = Lanes(2, DEADLINE_S)
    synchroniser = Synchroniser(units, executor, lanes, Scaling(1.0, 0.5), torch.float32, recorder)
    try:
        for step in range(steps):
            for name, param in params.items():
                param.grad = torch.full_like(param, float(step + groups.place.rank))
                if name != "d":  # has no gradient hook in any step, so that it leaves with the flush
                    synchroniser.ready(name)
            synchroniser.flush()
            assert all(torch.equal(p.grad, torch.full_like(p, step + 0.5)) for p in params.values())
    finally:
        lanes.close()
    return run_trace(recorder, RUN, rank=groups.place.rank, device="cpu", made_by="tests")


def test_the_runtime_records_every_action_of_every_unit():
    """On two ranks as threads: each action once per step, in order, between the unit's marks."""
    cluster = Cluster(1, 2, {Option.parse(t.option) for t in RUN.tensors})
    try:
        runs = cluster.run(train)
    finally:
        cluster.close()
    for rank, run in enumerate(runs):
        assert (run.rank, run.plan, [step.step for step in run.steps]) == (rank, RUN.seal, [1, 2, 3])
        assert len(run.units) == 5
        for step in run.steps:
            flush = step.whole(Mark.FLUSH)
            for number, unit in enumerate(run.units):
                of = {span.action: span for span in step.spans if span.unit == number}
                assert len(of) == sum(span.unit == number for span in step.spans)
                actions = [of[action] for action in range(len(unit.option.split()))]
                way = [of[Mark.SUBMITTED], of[Mark.COPY_IN], *actions, of[Mark.COPY_OUT], of[Mark.DONE]]
                assert all(before.end_s <= after.start_s for before, after in itertools.pairwise(way))
                assert 0 < way[0].start_s and way[-1].end_s <= flush.end_s
                first = number == 0 or run.units[number - 1].unit != unit.unit
                assert (Mark.READY in of) == (first and unit.tensors != ("d",))
                assert Mark.READY not in of or of[Mark.READY].end_s <= of[Mark.SUBMITTED].start_s
