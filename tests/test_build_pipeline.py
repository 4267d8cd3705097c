"""What the planner decides for pipelines: against brute force, within its constraints, and as a plan that can be read back."""

import itertools
import json

import pytest
from planner_cases import cluster_of, trace_of

from espresso_ds.cli import main
from espresso_ds.core.config import Constraints, EspressoBlock, PipelineSettings
from espresso_ds.core.errors import EspressoError, FileError, MismatchError
from espresso_ds.core.plan import load_plan_file
from espresso_ds.core.profile import CompressorProfile
from espresso_ds.planner.build import WORTHWHILE
from espresso_ds.planner.build_pipeline import make_pipeline_plan
from espresso_ds.planner.cost import Costs
from espresso_ds.planner.pipeline import AS_IT_IS, HEADER_BYTES, Pipeline, best, candidates, pairs_of

SIZES = (2**8, 2**24)
# settings, bytes of an element, seconds of an element's encoding, error
CODECS = [
    ({"name": "quantize", "bits": 8}, 1.0, 4e-10, 1e-5),
    ({"name": "quantize", "bits": 4}, 0.5, 4e-10, 1e-2),
    ({"name": "topk", "density": 0.1}, 0.4, 2e-9, 0.5),
    ({"name": "topk", "density": 0.01}, 0.04, 2e-9, 0.9),
    ({"name": "randomk", "density": 0.5}, 0.1, 1e-10, 0.5),
    ({"name": "signsgd"}, 0.125, 1e-10, 0.6),
]


def profile_of(rows, contention=0.3):
    codecs = []
    for settings, share, seconds, error in rows:
        times = {"numel": SIZES, "payload_nbytes": [max(1, round(share * n)) for n in SIZES], "contention": contention}
        times |= {"encode_s": [seconds * n for n in SIZES], "decode_s": [seconds / 2 * n for n in SIZES], "device": "cpu"}
        kind = {"summable": False, "votes": settings["name"] == "signsgd", "keeps_scale": settings["name"] != "signsgd"}
        codecs.append({"compressor": settings, "relative_error": error, "devices": [times], **kind})
    return CompressorProfile.model_validate({"codecs": codecs})


def pipeline_trace(stages=3, micro_batches=4, replicas=1, numel=2**18, forward_s=0.01, tensors=2):
    world = stages * replicas
    rows = [{"host": s * replicas, "forward_s": forward_s, "backward_s": 2 * forward_s, "after_s": 0.003} for s in range(stages)]
    pipeline = {
        "micro_batches": micro_batches,
        "stages": [{**row, "tensors": tensors} for row in rows],
        "boundaries": [{"forward_numel": [numel], "backward_numel": [numel], "element_bytes": 4, "examples": 4}] * (stages - 1),
    }
    ready = [(2**16, 0.5 * forward_s), (2**18, 1.9 * forward_s)] * stages
    return trace_of(ready, world=world, backward_s=2 * forward_s, pipeline=pipeline)


def links(world, bytes_per_s=25e6, alpha_s=1e-4):
    cluster = cluster_of(world=world, alpha_s=alpha_s, bytes_per_s=bytes_per_s)
    link = {"alpha_s": alpha_s, "beta_s_per_byte": 1 / bytes_per_s, "fit_error": 0.0}
    return type(cluster).model_validate({**cluster.model_dump(mode="json"), "links": {"inter": link}})


def plan_of(trace, rows=CODECS, block=None, **more):
    cluster = more.pop("cluster", None) or links(trace.world_size)
    return make_pipeline_plan(trace, cluster, profile_of(rows), made_by="tests", block=block or EspressoBlock(), **more)


@pytest.mark.parametrize("thrift", [0.0, 0.1])
@pytest.mark.parametrize("bytes_per_s", [5e6, 25e6, 1e8, 1e10])
@pytest.mark.parametrize("stages", [2, 3])
def test_decisions_are_the_best_of_all(stages, bytes_per_s, thrift):
    """Brute force over all pairs of all boundaries: none is faster by more than search by coordinates may miss."""
    trace = pipeline_trace(stages)
    cluster, codecs = links(stages, bytes_per_s), profile_of(CODECS)
    pipeline = Pipeline(trace.pipeline, cluster, Costs(cluster, codecs))
    menu = candidates(codecs.codecs, 0.1)
    every = pairs_of(menu, menu, True)
    found = best(pipeline, every, WORTHWHILE, thrift)
    seconds = pipeline.played(found).step_s
    plain = pipeline.played([(AS_IT_IS, AS_IT_IS)] * (stages - 1)).step_s
    fastest = min(pipeline.played(pairs).step_s for pairs in itertools.product(every, repeat=stages - 1))
    if fastest > plain * (1 - WORTHWHILE):
        assert found == [(AS_IT_IS, AS_IT_IS)] * (stages - 1)
    else:
        assert fastest <= seconds <= max(fastest * (1 + thrift) * 1.01, 0)


def test_menu_keeps_to_the_papers_limits_unless_they_are_loosened():
    codecs = profile_of(CODECS).codecs

    def names(menu):
        return [each.settings.label.partition(",")[0] for each in menu[1:]]

    assert names(candidates(codecs, 0.1)) == ["quantize bits=8", "quantize bits=4", "topk density=0.1"]
    assert names(candidates(codecs, 0.3)) == ["quantize bits=8", "quantize bits=4"]
    assert names(candidates(codecs, 0.01))[-1] == "topk density=0.01"
    menu = candidates(codecs, 0.1)
    for forward, backward in pairs_of(menu, menu, True):
        assert backward.relative_error == 0 or backward.relative_error < forward.relative_error
    assert len(pairs_of(menu, menu, False)) == len(menu) ** 2


def strongest(plan):
    found = plan.pipeline.settings
    every = [found, *found.boundaries.values()]
    return min(each.density or 1 for way in every for each in (way.forward, way.backward) if each is not None)


def test_a_plan_says_what_crosses_and_foretells_the_step():
    trace = pipeline_trace()
    plan = plan_of(trace)
    predicted, decided = plan.predicted, plan.pipeline
    assert (decided.stages, decided.micro_batches, decided.tensors, plan.tensors) == (3, 4, (0, 0, 0), ())
    assert (
        predicted.compute_s <= predicted.free_compression_s <= predicted.planned_s < predicted.uncompressed_s <= predicted.stock_s
    )
    assert predicted.planned_s < predicted.stock_s / 2
    assert predicted.uncompressed_bytes == 4 * (2 * (4 * 2**18 + HEADER_BYTES))  # the middle stage sends both ways
    assert len(decided.why) == 2
    assert all("instead" not in text and "MB a micro-batch, not 2.097" in text for text in decided.why)
    assert strongest(plan) == 0.1
    assert strongest(plan_of(trace, block=EspressoBlock(constraints=Constraints(boundary_density=0.01)))) == 0.01
    uncompressed = plan_of(trace, uncompressed=True)
    assert uncompressed.pipeline.settings == PipelineSettings()
    assert uncompressed.predicted.planned_s == uncompressed.predicted.uncompressed_s
    plan.check("here")


def test_aqsgd_is_for_activations_and_has_a_limit_of_its_own():
    block = EspressoBlock(pipeline=PipelineSettings(feedback="aqsgd", example_memory="8 bits"))
    found = plan_of(pipeline_trace(), block=block).pipeline.settings
    every = [found, *found.boundaries.values()]
    assert {each.forward.feedback for each in every if each.forward} == {"aqsgd"}
    assert {each.backward.feedback for each in every if each.backward} <= {"none"}
    assert not any(each.forward.density for each in every if each.forward)
    assert found.example_memory == "8 bits"
    assert PipelineSettings.model_validate(found.model_dump()) == found
    with pytest.raises(EspressoError, match="is for the planner; write it into the codec"):
        PipelineSettings.read({"feedback": "ef", "forward": {"name": "topk"}}, "block")


@pytest.mark.parametrize("measured", [True, False])
def test_replicas_gradients_are_planned_where_their_links_are_known(measured):
    trace = pipeline_trace(stages=2, replicas=2)
    replicas = links(2, bytes_per_s=2e6) if measured else None
    plan = plan_of(trace, replicas=replicas)
    plan.check("here")
    if not measured:
        assert plan.pipeline.tensors == (0, 0)
        assert "left to DeepSpeed" in plan.pipeline.why[-1]
        return
    assert plan.pipeline.tensors == (2, 2)
    assert [len(plan.of_stage(stage).tensors) for stage in (0, 1)] == [2, 2]
    assert {t.name for t in plan.tensors} == {f"t{n}" for n in range(4)}
    assert plan.predicted.planned_s > plan_of(trace).predicted.planned_s  # what was left out before
    assert plan.predicted.planned_s < plan.predicted.uncompressed_s < plan.predicted.stock_s


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"block": {"pipeline": {"forward": {"name": "topk"}}}}, FileError, '"pipeline" names codecs of its own'),
        ({"rows": [CODECS[3], CODECS[5]]}, FileError, "none of topk density=0.01"),
        ({"cluster": 4}, MismatchError, "traced with 3 ranks"),
        ({"replicas": 2}, MismatchError, "a stage has 1 replicas"),
        ({"cluster": 0}, FileError, "the inter link between stages 0 and 1 was not measured"),
    ],
)
def test_what_does_not_fit_is_said(change, kind, words):
    more = dict(change)
    if "block" in more:
        more["block"] = EspressoBlock.model_validate(more["block"])
    if "replicas" in more:
        more["replicas"] = links(more["replicas"])
    if "cluster" in more:
        more["cluster"] = links(more["cluster"]) if more["cluster"] else cluster_of(world=3)
    with pytest.raises(kind, match=words):
        plan_of(pipeline_trace(), **more)


def test_from_files_to_a_plan_that_explains_itself(tmp_path, capsys):
    trace, codecs = pipeline_trace(), profile_of(CODECS)
    for name, record in (("trace", trace), ("cluster", links(3)), ("compressors", codecs)):
        record.save(tmp_path / f"{name}.json")
    block = {"pipeline": {"evaluation": "uncompressed"}}
    (tmp_path / "ds.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 4, "espresso": block}))
    files = [word for kind in ("trace", "cluster", "compressors") for word in (f"--{kind}", str(tmp_path / f"{kind}.json"))]
    main(["plan", "--ds-config", str(tmp_path / "ds.json"), *files, "-o", str(tmp_path / "plan.json")])
    assert "3 stages; expected step" in capsys.readouterr().out
    config, written, plan = load_plan_file(tmp_path / "plan.json")
    assert (config["train_micro_batch_size_per_gpu"], written.pipeline) == (4, None)
    assert plan.pipeline.settings.evaluation == "uncompressed"
    main(["explain", str(tmp_path / "plan.json")])
    assert "boundary 1: " in capsys.readouterr().out
    for command in (["replan", str(tmp_path / "plan.json"), "--run", "x.json"], ["what-if", *files, "--nodes", "1..4"]):
        with pytest.raises((EspressoError, SystemExit)):
            main(command)
