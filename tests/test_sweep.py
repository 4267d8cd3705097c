"""benchmarks/sweep: shapes worked out by hand, groups against whole clusters, its curves against plans made one by one."""

import json
import math
import shutil
import sys
from collections import Counter

import jobs
import pytest
from planner_cases import codecs_of, on_both, trace_of

from benchmarks.planner import testbeds
from benchmarks.sweep import __main__ as command
from benchmarks.sweep import check, curves, large, page, paper, planning, traces, transformer
from espresso_ds.core.option import Level
from espresso_ds.core.profile import Link
from espresso_ds.planner.build import make_plan
from espresso_ds.planner.routine_models import nominal_cluster, rescaled

INTRA = Link(alpha_s=2e-5, beta_s_per_byte=8 / 100e9, fit_error=0.0)
INTER = Link(alpha_s=1.5e-4, beta_s_per_byte=8 / 25e9, fit_error=0.0)
RESULTS = json.loads(command.RESULTS.read_text())
PARTS = {**command.PARTS, "paper": paper}


def test_the_large_model_has_its_published_number_of_parameters():
    model = transformer.LLAMA_2_70B
    assert model.parameters == 68_976_648_192
    counted = Counter(shape for _, shape, _ in model.backward())
    matrices = {(28672, 8192): 160, (8192, 28672): 80, (8192, 8192): 160, (1024, 8192): 160, (32000, 8192): 2}
    assert counted == {**matrices, (1, 8192): 161}


def test_a_rank_holds_its_part_of_every_matrix_and_all_of_every_norm():
    trace = transformer.trace_of(transformer.LLAMA_2_70B, transformer.TRAINING, 16)
    norms = 161 * 8192
    assert sum(tensor.numel for tensor in trace.tensors) == (68_976_648_192 - norms) // 8 + norms
    assert all(math.prod(tensor.shape) == tensor.numel for tensor in trace.tensors)
    shapes = {tensor.name: tensor.shape for tensor in trace.tensors}
    at = "model.layers.79."
    assert shapes[f"{at}mlp.down_proj.weight"] == (8192, 3584) and shapes[f"{at}mlp.up_proj.weight"] == (3584, 8192)
    assert shapes[f"{at}self_attn.k_proj.weight"] == (128, 8192) and shapes[f"{at}input_layernorm.weight"] == (8192,)
    assert (trace.world_size, trace.ranks_per_node, trace.wire_dtype) == (16, 1, "bfloat16")


def test_its_times_are_its_flops():
    """6 FLOPs per weight and token, the embedding's table left out, and attention's two products over half the sequence."""
    training = transformer.TRAINING
    trace = transformer.trace_of(transformer.LLAMA_2_70B, training, 2)
    weights = 68_976_648_192 - 161 * 8192 - 32000 * 8192
    products = 2 * 80 * (2 * 8192 * training.sequence / 2)
    flops = 3 * training.tokens * (2 * weights + products)
    assert trace.compute_s == pytest.approx(flops / (8 * training.flops_per_s))
    ready = [tensor.ready_s for tensor in trace.tensors]
    assert ready == sorted(ready) and ready[-1] == trace.backward_s == 2 * trace.forward_s
    names = [tensor.name for tensor in trace.tensors]
    assert names[0] == "lm_head.weight" and names[-1] == "model.embed_tokens.weight" and len(set(names)) == 723


def test_a_shape_that_cannot_be_cut_is_refused():
    odd = transformer.Transformer("odd", 2, 64, 128, 6, 6, 100)
    with pytest.raises(ValueError, match="odd: 6 is not 8 equal parts"):
        transformer.trace_of(odd, transformer.TRAINING, 2)


@pytest.mark.parametrize("nodes", [2, 16])
def test_one_group_sees_what_eight_groups_of_a_whole_cluster_leave_it(nodes):
    inter = Link(alpha_s=large.LATENCY_S, beta_s_per_byte=8e-9 / 100, fit_error=0.0)
    whole = nominal_cluster(nodes, 8, INTRA, inter)
    at_once = {cost.routine: cost for cost in whole.routines if (cost.level, cost.groups) == (Level.INTER, 8)}
    alone = large.group_of(100, nodes).routines
    assert len(alone) == len(at_once)
    for cost in alone:
        assert (cost.level, cost.ranks) == (Level.FLAT, nodes)
        assert cost.seconds == pytest.approx(at_once[cost.routine].seconds)


def test_ring_latencies_grow_in_proportion_and_bandwidths_stay():
    cluster = nominal_cluster(8, 8, INTRA, INTER)
    assert traces.ring_latencies(cluster) == cluster
    larger = rescaled(cluster, nodes=64)
    ring = traces.ring_latencies(larger)
    for cost, other in zip(ring.routines, larger.routines, strict=True):
        assert cost.beta_s_per_byte == pytest.approx(other.beta_s_per_byte)
        if cost.level is not Level.INTRA:
            assert cost.alpha_s == pytest.approx(1.5e-4 * 63 / 7) and cost.alpha_s > other.alpha_s
    assert traces.ring_latencies(rescaled(cluster, nodes=1)) == rescaled(cluster, nodes=1)


def test_a_curve_is_a_plan_for_every_point_and_its_baselines():
    rows = [(int(4e5), 0.002 * number) for number in range(1, 4)]
    trace = trace_of(rows, world=8, node=2, device="cuda", forward_s=0.002)
    codecs = on_both(codecs_of(device="gpu", encode=1e-11, decode=1e-11), codecs_of(device="cpu", encode=1e-9, decode=1e-9))
    cluster = nominal_cluster(4, 2, INTRA, INTER)
    found = curves.curve(trace, cluster, codecs, [1, 4, 64])
    assert [(point["nodes"], point["ranks"]) for point in found["points"]] == [(1, 2), (4, 8), (64, 128)]
    same = make_plan(trace, cluster, codecs, made_by="test", thrift=0).predicted
    assert {name: found["points"][1][name] for name in type(same).model_fields} == same.model_dump()
    for point in found["points"]:
        times = traces.seconds(point)
        assert times["upper bound"] <= times["planned"]
        assert times["planned"] <= min(seconds for name, seconds in times.items() if name != "upper bound") * (1 + 1e-9)
        assert 0 < traces.efficiency(point, "planned") <= 1
        assert point["baselines"].keys() == {"FP32", "BytePS-Compress", "HiTopKComm", "HiPress"}
        assert point["baselines"]["FP32"]["bytes"] >= point["baselines"]["BytePS-Compress"]["bytes"] > 0
    assert len(found["answers"]) == 4


def test_planning_is_timed_for_as_many_nodes_as_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(planning, "planner", lambda *given, **more: lambda cluster: asked.append(cluster.nodes))
    assert planning.timed(None, nominal_cluster(8, 8, INTRA, INTER), None, 32) >= 0
    assert asked == [32]
    (table,) = planning.tables({"gpus": (16, 1024), "rows": [{"case": "m + c, t", "tensors": 3, "cpu_s": [0.25, 1.5]}]})
    assert "| m + c, t | 3 | 0.25 | 1.5 |" in page.markdown(table)


@pytest.mark.skipif(not (testbeds.SHARED / "traces").is_dir(), reason="the paper's traces are not here")
def test_at_the_testbeds_own_size_the_sweep_is_what_the_planners_benchmark_found():
    rows = json.loads((jobs.ROOT / "benchmarks/results/planner.json").read_text())["paper"]["rows"]
    row = next(row for row in rows if (row["model"], row["links"]) == ("vgg16", "nominal"))
    case = testbeds.Case("vgg16", row["testbed"], row["codec"])
    swept = next(traces.of(RESULTS["traces"], own=True, **case._asdict()))
    point = next(point for point in swept["points"] if point["nodes"] == 8)
    trace, cluster = testbeds.trace_of(case.model, case.testbed), testbeds.cluster_of(case.testbed)
    again = curves.baselines(trace, cluster, testbeds.compressors_of(case.testbed, case.codec))
    for name, other in row["baselines"].items():
        assert point["baselines"][name]["s"] == pytest.approx(other["s"]) == again[name]["s"]


def skewed(cluster, by):
    """The cluster with the seconds of some routines multiplied."""
    costs = [
        cost.model_copy(update={"seconds": tuple(s * by.get(cost.routine, 1) for s in cost.seconds)}) for cost in cluster.routines
    ]
    return cluster.model_copy(update={"routines": tuple(costs)})


def test_the_check_finds_how_far_a_prediction_is_off():
    small = nominal_cluster(2, 1, INTRA, INTER, backend="gloo")
    large_one = rescaled(small, nodes=8)
    found = check.compare(small, skewed(large_one, {"AG": 2.0, "BC": 0.5}))
    assert found["summary"]["AG"] == {"sizes": 3, "median": pytest.approx(0.5), "worst": pytest.approx(0.5)}
    assert found["summary"]["BC"]["worst"] == pytest.approx(2)
    assert found["summary"]["all"]["median"] == pytest.approx(1) and found["summary"]["AR"]["worst"] == pytest.approx(1)
    kinds = {row["nbytes"]: row["bandwidth"] for row in found["ratios"] if row["routine"] == "AR"}
    assert kinds == {1 << 10: False, 1 << 20: False, 1 << 30: True}, "7 times 150 us; 1 MiB takes 0.6 ms"


def test_the_check_takes_medians_at_sizes_that_most_profiles_have():
    profiles = [skewed(nominal_cluster(2, 1, INTRA, INTER), {"AG": factor}) for factor in (1.0, 9.0, 2.0)]

    def shortened(profile):
        short = profile.routines[0].model_copy(update={"nbytes": (1 << 10, 1 << 20), "seconds": profile.routines[0].seconds[:2]})
        return profile.model_copy(update={"routines": (short, *profile.routines[1:])})

    assert check.medians([shortened(profiles[0]), *profiles[1:]]).routines[0].nbytes == (1 << 10, 1 << 20, 1 << 30)
    kept = check.medians([shortened(profiles[0]), shortened(profiles[1]), profiles[2]])
    assert kept.routines[0].nbytes == (1 << 10, 1 << 20)
    (gathered,) = [cost for cost in kept.routines if cost.routine == "AG"]
    (single,) = [cost for cost in profiles[2].routines if cost.routine == "AG"]
    assert gathered.seconds == single.seconds[: len(gathered.seconds)]
    assert gathered.beta_s_per_byte == pytest.approx(2 * single.beta_s_per_byte), "the line goes through the seconds"
    sizes = {row["nbytes"] for row in check.compare(kept, profiles[2])["ratios"] if row["routine"] == kept.routines[0].routine}
    assert sizes == {1 << 10, 1 << 20}, "nothing is foretold beyond what was measured"


def test_clusters_of_the_check_have_as_much_of_a_core_per_rank():
    for cores in (2, 4):
        for small, big in check.comparisons(cores)["as much of a core per rank"]:
            assert big.hosts == 2 * small.hosts and big.slots == small.slots and big.cores == 2 * small.cores


def test_the_page_holds_the_results(tmp_path):
    shutil.copy(command.DOCS / "sweep.md", tmp_path)
    page.write(RESULTS, PARTS, tmp_path / "sweep.md")
    assert (tmp_path / "sweep.md").read_text() == (command.DOCS / "sweep.md").read_text()


def test_a_page_without_a_place_for_a_table_is_refused(tmp_path):
    (tmp_path / "sweep.md").write_text("# no marks\n")
    with pytest.raises(ValueError, match="0 places `<!-- traces -->`"):
        page.write({"traces": RESULTS["traces"]}, PARTS, tmp_path / "sweep.md")


def test_without_the_papers_files_it_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "SHARED", tmp_path)
    monkeypatch.setattr(sys, "argv", ["sweep", "traces", "--out", str(tmp_path / "out.json")])
    assert command.main() == 1
    assert f"{tmp_path} lacks traces and testbeds" in capsys.readouterr().err and not (tmp_path / "out.json").exists()


def test_the_results_are_of_all_that_is_asked_for():
    swept, big = RESULTS["traces"], RESULTS["large"]
    for model in testbeds.MODELS:
        for testbed in testbeds.TESTBEDS:
            for link in ("10 Gbit/s", "25 Gbit/s", "100 Gbit/s", "400 Gbit/s"):
                (found,) = traces.of(swept, model=model, testbed=testbed, link=link)
                assert [point["ranks"] for point in found["points"]] == [8 << power for power in range(8)]
    assert {(found["codec"], found["gbit_per_s"]) for found in big["curves"]} == {
        (codec, rate) for codec in large.CODECS for rate in traces.GBIT_PER_S
    }
    points = [point for found in (*swept["curves"], *big["curves"]) for point in found["points"]]
    assert all(point["planned_s"] <= point["uncompressed_s"] * (1 + 1e-9) for point in points)
    assert all(point["compute_s"] * (1 - 1e-9) <= point["free_compression_s"] <= point["planned_s"] for point in points)
