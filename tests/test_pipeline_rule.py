"""What a run is told about a checkpoint whose model was trained with other activations than it sends."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from espresso_ds.core.config import PipelineSettings
from espresso_ds.integrations import pipeline_checkpoint
from espresso_ds.integrations.pipeline_checkpoint import RULE, carry_rule, keeps_only_some, warn_of_evaluation, warn_of_other_rule

TOPK = PipelineSettings.model_validate({"forward": {"name": "topk", "density": 0.1}})
OWN = PipelineSettings.model_validate({"boundaries": {1: {"forward": {"name": "topk", "density": 0.1}}}})
BITS = PipelineSettings.model_validate({"forward": {"name": "quantize", "bits": 4}})
NONE = PipelineSettings()
AQSGD = {"forward": {"name": "quantize", "bits": 2, "feedback": "aqsgd"}}


def with_memory(mode, **given):
    return PipelineSettings.model_validate({"forward": {"name": "topk", "density": 0.1, "feedback": mode}, **given})


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(pipeline_checkpoint, "tell", lines.append)
    return lines


@pytest.mark.parametrize(
    ("trained", "run", "words"),
    [
        (TOPK, None, "trained with topk density=0.1"),
        (OWN, None, "trained with topk density=0.1"),
        (TOPK, NONE, "usually worse with them"),
        (TOPK, BITS, "usually worse with them"),
        (TOPK, TOPK, None),
        (TOPK, OWN, "with other codecs of activations"),
        (BITS, None, None),  # bits lose little
        (BITS, NONE, "with other codecs of activations"),
        (BITS, BITS, None),
        (NONE, None, None),
    ],
)
def test_rule_of_a_checkpoint(tmp_path, said, trained, run, words):
    (tmp_path / RULE).write_text(json.dumps(trained.model_dump(mode="json", exclude_none=True)))
    warn_of_other_rule(tmp_path, run)
    assert [words in line for line in said] == ([] if words is None else [True])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (TOPK, None),
        (TOPK.model_copy(update={"evaluation": "uncompressed"}), "learnt to do without the rest"),
        (BITS.model_copy(update={"evaluation": "uncompressed"}), None),
        (PipelineSettings.model_validate(AQSGD), "remembers examples of training alone"),
        (PipelineSettings.model_validate({"boundaries": {1: AQSGD}}), "remembers examples of training alone"),
        (PipelineSettings.model_validate({**AQSGD, "evaluation": "uncompressed"}), None),
        (with_memory("ef21", evaluation="uncompressed"), None),
        (with_memory("aqsgd", evaluation="uncompressed"), None),
        (NONE, None),
    ],
)
def test_evaluation_that_training_has_not_prepared_for_is_named_at_start(said, given, words):
    warn_of_evaluation(given)
    assert [words in line for line in said] == ([] if words is None else [True])


def test_a_checkpoint_without_a_rule_says_nothing_and_a_torn_one_is_named(tmp_path, said):
    warn_of_other_rule(tmp_path, None)
    assert said == []
    (tmp_path / RULE).write_text("{")
    warn_of_other_rule(tmp_path, None)
    assert RULE in said[0]


class Weights:
    """What a PipelineModule has to save and load with."""

    def save_state_dict(self, save_dir, checkpoint_engine, exclude_frozen_params=False):
        (Path(save_dir) / "layer_00-model_states.pt").touch()

    def load_state_dir(self, load_dir, checkpoint_engine, strict=True):
        assert (Path(load_dir) / "layer_00-model_states.pt").exists()


@pytest.mark.parametrize(("run", "warnings"), [(None, 1), (BITS, 1), (TOPK, 0)])
def test_exported_weights_carry_the_rule(tmp_path, said, monkeypatch, run, warnings):
    """`save_state_dict` is DeepSpeed's way to save a PipelineModule without its engine's state."""
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    trained, other = Weights(), Weights()
    carry_rule(trained, TOPK)
    carry_rule(other, run)
    trained.save_state_dict(str(tmp_path), checkpoint_engine=None)
    other.load_state_dir(load_dir=str(tmp_path), strict=True, checkpoint_engine=None)
    assert len(said) == warnings


def test_weights_without_compression_carry_none(tmp_path, said):
    plain = Weights()
    carry_rule(plain, None)
    plain.save_state_dict(tmp_path, None)
    plain.load_state_dir(tmp_path, None)
    assert (said, [path.name for path in tmp_path.iterdir()]) == ([], ["layer_00-model_states.pt"])


def test_what_keeps_only_some():
    assert keeps_only_some(BITS) is None
    assert keeps_only_some(OWN).startswith("topk density=0.1")
