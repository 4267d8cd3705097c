"""From a user's PipelineModule to a plan and back to its training: trace, plan and run, with processes."""

import json
import re

import pytest
from jobs import TESTS, run, torchrun
from planner_cases import cluster_of
from test_build_pipeline import CODECS, profile_of

from espresso_ds.cli import main
from espresso_ds.core.config import PipelineSettings
from espresso_ds.core.plan import load_plan_file
from espresso_ds.core.profile import ModelTrace

pytestmark = pytest.mark.slow
PORT = 29656
SCRIPT = TESTS / "scripts/staged.py"
DS = {"train_micro_batch_size_per_gpu": 6, "gradient_accumulation_steps": 3, "steps_per_print": 10**9}
DS |= {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def traced(request, tmp_path_factory):
    """A folder with ds.json and the trace of two stages with two replicas each."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "ds.json").write_text(json.dumps(DS | {"bf16": {"enabled": request.param == "bf16"}}))
    out = folder / "trace.json"
    done = run([*torchrun(4, PORT), SCRIPT, 50], cwd=folder, ESPRESSO_TRACE_OUT=str(out), ESPRESSO_TRACE_STEPS="4")
    assert out.exists(), done.stdout[-3000:]
    return folder


def test_trace_has_stages_boundaries_and_gradients(traced):
    trace = ModelTrace.load(traced / "trace.json")
    assert (trace.world_size, trace.pipeline.micro_batches, len(trace.pipeline.stages)) == (4, 3, 2)
    (boundary,) = trace.pipeline.boundaries
    assert (boundary.forward_numel, boundary.backward_numel, boundary.examples) == ((288,), (288,), 6)
    assert (trace.config["precision"], boundary.element_bytes) in (("fp32", 4), ("bf16", 2))
    assert [stage.tensors for stage in trace.pipeline.stages] == [4, 4]
    assert sorted(tensor.name for tensor in trace.tensors) == [f"{n}.0.{kind}" for n in range(4) for kind in ("bias", "weight")]
    assert all(stage.forward_s > 0 and stage.backward_s > 0 and stage.after_s > 0 for stage in trace.pipeline.stages)
    for stage, tensors in zip(trace.pipeline.stages, (trace.tensors[:4], trace.tensors[4:]), strict=True):
        assert all(0 < tensor.ready_s < 10 * stage.backward_s for tensor in tensors)


def on_one_host(ranks):
    """A profile of slow links inside one host."""
    cluster = cluster_of(world=ranks, node=ranks, alpha_s=1e-4, bytes_per_s=2e5)
    link = {"alpha_s": 1e-4, "beta_s_per_byte": 5e-6, "fit_error": 0.0}
    return type(cluster).model_validate({**cluster.model_dump(mode="json"), "links": {"intra": link}})


def test_plan_is_carried_out_on_the_users_script(traced):
    """Boundaries and gradients of replicas in one plan, which the script has not heard of."""
    on_one_host(4).save(traced / "cluster.json")
    on_one_host(2).save(traced / "replicas.json")
    profile_of(CODECS).save(traced / "compressors.json")
    files = [word for kind in ("trace", "cluster", "compressors", "replicas") for word in (f"--{kind}", f"{traced / kind}.json")]
    plan = traced / "plan.json"
    main(["plan", "--ds-config", str(traced / "ds.json"), *files, "-o", str(plan)])
    _, _, made = load_plan_file(plan)
    assert made.pipeline.settings != PipelineSettings()
    assert made.pipeline.tensors == (4, 4)
    command = [*torchrun(4, PORT), SCRIPT, 6]
    plain, planned = run(command, cwd=traced), run(command, cwd=traced, ESPRESSO_CONFIG=str(plan))
    assert "pipeline boundaries compressed; boundary 0 forward: " in planned.stdout, planned.stdout[-3000:]
    assert "plan active" in planned.stdout
    assert (plain.returncode, planned.returncode) == (0, 0), plain.stdout[-3000:] + planned.stdout[-3000:]
    first, second = (json.loads(re.search(r"losses (\[.*\])", done.stdout)[1]) for done in (plain, planned))
    assert first != second
    assert second[-1] < second[0]
    assert second[-1] == pytest.approx(first[-1], rel=0.1)
