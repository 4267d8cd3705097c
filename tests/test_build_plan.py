"""From profiles to a plan in a file, its explanation and its pictures."""

import json
from dataclasses import replace
from io import StringIO

import pytest
from planner_cases import cluster_of, codecs_of, public_case, trace_of
from rich.console import Console

from espresso_ds.core.config import EspressoBlock
from espresso_ds.core.errors import FileError, MismatchError
from espresso_ds.core.option import Option
from espresso_ds.core.plan import load_plan_file, save_plan_file
from espresso_ds.planner.build import in_wire_order, make_plan, timelines_of, units_of
from espresso_ds.planner.cost import Costs
from espresso_ds.planner.render import draw, explain
from espresso_ds.planner.timeline import iteration_time, stock_time

SLOW, FAST = 25e6, 1e11  # bytes per second
SIZES = [2**18, 512, 2**20, 512, 2**20, 2**20, 512, 2**19]


@pytest.fixture
def profiles():
    """A small model on two hosts, its tensors out of order, behind a 200 Mbit/s link."""
    trace = trace_of([(n, 0.02 * (i + 1) % 0.13) for i, n in enumerate(SIZES)], forward_s=0.05, backward_s=0.15, after_s=0.01)
    return trace, cluster_of(alpha_s=1e-3, bytes_per_s=SLOW), codecs_of(encode=2e-9, decode=1e-9, share=0.02, contention=0.5)


def test_the_plan_is_complete_and_says_what_the_timeline_says(profiles):
    trace, cluster, codecs = profiles
    plan = make_plan(trace, cluster, codecs, made_by="tests")
    plan.check("plan")
    assert {t.name: (t.shape, t.dtype, t.numel) for t in plan.tensors} == {
        t.name: (t.shape, t.dtype, t.numel) for t in trace.tensors
    }
    ready = {t.name: t.ready_s for t in trace.tensors}
    assert [ready[t.name] for t in plan.tensors] == sorted(ready.values())
    assert (plan.made_for.nodes, plan.made_for.ranks_per_node, plan.made_for.world_size) == (2, 1, 2)
    assert (plan.made_for.model, plan.made_for.config) == (trace.model_fingerprint, trace.config)
    assert plan.profiles == {"trace": trace.fingerprint, "cluster": cluster.fingerprint, "compressors": codecs.fingerprint}

    costs, ordered = Costs(cluster, codecs), in_wire_order(trace)
    units = units_of(plan, ordered)
    pieces = [piece for unit in units for piece in unit.pieces(2)]
    predicted = plan.predicted
    assert predicted.planned_s == pytest.approx(iteration_time(units, ordered, costs))
    assert predicted.planned_bytes == round(sum(costs.walk(p.option, p.numel).sent_bytes for p in pieces))
    assert predicted.uncompressed_bytes == 4 * sum(SIZES)
    assert predicted.stock_s == pytest.approx(stock_time(trace, costs))
    assert predicted.compute_s == trace.compute_s < predicted.planned_s < predicted.uncompressed_s < predicted.stock_s
    assert make_plan(trace, cluster, codecs, made_by="tests") == plan


def test_saves_s_is_what_the_step_loses_without_the_unit(profiles):
    trace, cluster, codecs = profiles
    plan = make_plan(trace, cluster, codecs, made_by="tests")
    costs, ordered = Costs(cluster, codecs), in_wire_order(trace)
    units = units_of(plan, ordered)
    for number, group in enumerate(plan.units()):
        plain = [replace(units[number], option=Option.parse(text)) for text in ("AR.flat", "RS.flat AG.flat", "RD.flat BC.flat")]
        others = [[*units[:number], other, *units[number + 1 :]] for other in plain]
        lost = 0.0
        if units[number].option.compresses:
            lost = min(iteration_time(other, ordered, costs) for other in others) - iteration_time(units, ordered, costs)
        assert group[0].saves_s == pytest.approx(lost, abs=1e-12)
        assert "ms" in group[0].why or "bubble" in group[0].why
        if Option.parse(group[0].option).compresses:
            assert group[0].saves_s > 0 and "saves" in group[0].why and "next best" in group[0].why


def test_asked_for_uncompressed_it_is(profiles):
    plan = make_plan(*profiles, made_by="tests", uncompressed=True)
    assert {t.option for t in plan.tensors} == {"AR.flat"}
    assert plan.predicted.planned_s == plan.predicted.uncompressed_s < plan.predicted.stock_s
    assert plan.predicted.planned_bytes == plan.predicted.uncompressed_bytes


def test_a_fast_link_gets_an_uncompressed_plan(profiles):
    trace, _, codecs = profiles
    plan = make_plan(trace, cluster_of(alpha_s=1e-5, bytes_per_s=FAST), codecs, made_by="tests")
    assert {t.option for t in plan.tensors} == {"AR.flat"}
    assert "Nothing is compressed" in text_of(explain(plan))


def test_profiles_of_different_worlds_are_refused(profiles):
    trace, _, codecs = profiles
    with pytest.raises(MismatchError, match=r"traced with 2 ranks \(1 per node\).*of 4 ranks \(2 per node\).*`espresso trace`"):
        make_plan(trace, cluster_of(world=4, node=2), codecs, made_by="tests")
    with pytest.raises(MismatchError, match=r"of 2 ranks \(2 per node\)"):
        make_plan(trace, cluster_of(world=2, node=2), codecs, made_by="tests")


def test_summable_payloads_are_used_where_they_pay(profiles):
    """Eight ranks: the allgather's traffic grows with the ranks, the allreduce's does not."""
    trace, _, _ = profiles
    trace = trace.model_copy(update={"world_size": 8})
    cluster = cluster_of(world=8, alpha_s=1e-2, bytes_per_s=1e6)
    plans = [
        make_plan(trace, cluster, codecs_of(encode=1e-10, decode=1e-10, share=0.1, summable=summable), made_by="tests")
        for summable in (False, True)
    ]
    assert plans[1].predicted.planned_s < plans[0].predicted.planned_s
    assert any(t.option == "C.cpu AR.flat D.cpu" for t in plans[1].tensors)


def test_a_plan_survives_its_file(profiles, tmp_path):
    plan = make_plan(*profiles, made_by="tests")
    save_plan_file(tmp_path / "plan.json", {"train_batch_size": 8}, EspressoBlock(), plan)
    config, _, loaded = load_plan_file(tmp_path / "plan.json")
    assert loaded == plan
    assert config["train_batch_size"] == 8


def test_progress_counts_up_to_the_end(profiles):
    seen = []
    make_plan(*profiles, made_by="tests", progress=lambda stage, done, total: seen.append((stage, done, total)))
    assert [done for _, done, _ in seen] == list(range(len(seen)))
    assert len(seen) > 1 and all(done < total == seen[0][2] for _, done, total in seen)
    assert all("units" in stage for stage, done, _ in seen if done)


def test_explain_shows_the_summary_every_tensor_and_one_tensor(profiles):
    plan = make_plan(*profiles, made_by="tests")
    shown = text_of(explain(plan))
    assert "Compression pays" in shown and "DeepSpeed as it is" in shown
    assert all(tensor.name in shown and f"{tensor.numel:,}" in shown for tensor in plan.tensors)
    largest = max(plan.tensors, key=lambda tensor: tensor.numel)
    one = text_of(explain(plan, largest.name))
    assert largest.option in one and largest.why in one
    with pytest.raises(FileError, match="no tensor 't77'; did you mean"):
        explain(plan, "t77")


def test_pictures_and_timelines_agree_with_the_plan(profiles, tmp_path):
    plan = make_plan(*profiles, made_by="tests")
    timelines = timelines_of(plan, *profiles)
    times = [timeline.iteration_s for timeline in timelines.values()]
    p = plan.predicted
    assert times == pytest.approx([p.stock_s, p.uncompressed_s, p.planned_s])
    draw(timelines, tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    draw(timelines, tmp_path / "timeline.svg")
    drawn = (tmp_path / "timeline.svg").read_text()
    assert all(f">{title}: " in drawn for title in timelines) and "communicate, compressed" in drawn
    with pytest.raises(MismatchError, match="trace profile"):
        timelines_of(plan, profiles[0].model_copy(update={"after_s": 1.0}), *profiles[1:])


def test_a_model_of_the_paper_with_gpu_codecs():
    case = public_case("gpt2", "v100-pcie-25g", "efsignsgd")
    if case is None:
        pytest.skip("the public traces are not beside this checkout")
    plan = make_plan(*case, made_by="tests")
    p = plan.predicted
    assert p.compute_s < p.planned_s < p.uncompressed_s < p.stock_s
    json.dumps(plan.model_dump(mode="json"), allow_nan=False)


def text_of(renderable):
    console = Console(width=220, file=StringIO())
    console.print(renderable)
    return console.file.getvalue()
