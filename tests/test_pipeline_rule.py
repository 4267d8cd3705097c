"""What a run is told about a checkpoint whose model was trained with other activations than it sends."""

import json

import pytest

from espresso_ds.core.config import PipelineSettings
from espresso_ds.integrations import pipeline_checkpoint
from espresso_ds.integrations.pipeline_checkpoint import RULE, keeps_only_some, warn_of_other_rule, warn_when_loading

TOPK = PipelineSettings.model_validate({"forward": {"name": "topk", "density": 0.1}})
OWN = PipelineSettings.model_validate({"boundaries": {1: {"forward": {"name": "topk", "density": 0.1}}}})
BITS = PipelineSettings.model_validate({"forward": {"name": "quantize", "bits": 4}})
NONE = PipelineSettings()


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


def test_a_checkpoint_without_a_rule_says_nothing_and_a_torn_one_is_named(tmp_path, said):
    warn_of_other_rule(tmp_path, None)
    assert said == []
    (tmp_path / RULE).write_text("{")
    warn_of_other_rule(tmp_path, None)
    assert RULE in said[0]


def test_an_engine_without_us_warns_when_it_loads(tmp_path, said):
    class Engine:
        def load_checkpoint(self, folder, tag=None):
            return (None if tag == "gone" else str(tmp_path / "mp_rank_00_model_states.pt")), {}

    (tmp_path / RULE).write_text(json.dumps(TOPK.model_dump(mode="json", exclude_none=True)))
    engine = Engine()
    warn_when_loading(engine)
    assert engine.load_checkpoint("x", tag="gone") == (None, {})
    assert said == []
    engine.load_checkpoint("x")
    assert len(said) == 1


def test_what_keeps_only_some():
    assert keeps_only_some(BITS) is None
    assert keeps_only_some(OWN).startswith("topk density=0.1")
