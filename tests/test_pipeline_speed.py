"""The benchmark of pipelines over slow links: its models, and its table."""

import pytest
import torch

from benchmarks.pipeline_speed.report import report
from benchmarks.pipeline_speed.results import BF16, OURS, PLAIN, CellResult
from espresso_ds.core.errors import FileError


def cell(**more):
    variants = {
        PLAIN: {"step_s": [0.4, 0.5, 0.6], "sent_bytes": 1000.0, "predicted_s": 0.6},
        BF16: {"step_s": [0.3, 0.2, 0.1], "sent_bytes": 500.0},
        OURS: {"step_s": [0.1, 0.1, 0.1], "sent_bytes": 125.0, "predicted_s": 0.11},
    }
    about = {"model": "text", "stages": 2, "rate": "100mbit", "machine": {"cores": 2}, "rounds": 3, "decided": ["boundary 0: x"]}
    return CellResult.model_validate({**about, "variants": variants, **more})


def test_report_has_ratios_bytes_and_predictions(tmp_path):
    cell().save(tmp_path / "text-2-100mbit.json")
    lines = report(tmp_path).splitlines()
    assert len(lines) == 2 + 3
    assert lines[2] == f"| text, 2, 100mbit | {PLAIN} | 0.500 | 1.00 | 0.40 | 100.0% | 0.600 s, +20% |"
    assert lines[3] == f"| text, 2, 100mbit | {BF16} | 0.200 | 2.50 | 1.00 | 50.0% |  |"
    assert lines[4] == f"| text, 2, 100mbit | {OURS} | 0.100 | 5.00 | 2.00 | 12.5% | 0.110 s, +10% |"


def test_a_step_that_took_no_time_is_no_result():
    variants = {PLAIN: {"step_s": [0.0], "sent_bytes": 1.0}}
    with pytest.raises(FileError, match="step_s"):
        CellResult.from_json({**cell().model_dump(mode="json"), "variants": variants}, "here")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text", "image"])
def test_stages_keep_the_shape_and_learn(name):
    from benchmarks.pipeline_speed.models import MODELS, batches

    workload = MODELS[name]
    torch.manual_seed(0)
    stage = workload.stage()
    x, y = next(batches(name))
    assert x.shape == y.shape == workload.shape
    assert x.numel() * x.element_size() == 1_048_576
    out = stage(x)
    assert out.shape == workload.shape
    out.pow(2).mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in stage.parameters())
