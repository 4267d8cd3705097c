"""The study of compressed pipeline boundaries: its models' stages, its methods' settings, its findings and its report."""

import json

import pytest
import torch

from benchmarks.pipeline_quality import data, findings, methods, report
from benchmarks.pipeline_quality.models import MODELS, STAGES, Setup
from benchmarks.pipeline_quality.results import Run, Study, load_studies, open_study
from benchmarks.pipeline_quality.start import make_start
from espresso_ds.core.config import PipelineSettings
from espresso_ds.core.errors import FileError

BOUNDARIES = {"image": [(16, 8, 8), (32, 4, 4), (64, 2, 2)], "text": [(data.LENGTH, 64)] * 3}
GRADIENTS, STRONGEST, RISE, ONLY_WITH, NO_BETTER, EF, EF21, AQ, SHARED = (text for text, _ in findings._QUESTIONS)


def study_of(model, harms, uncompressed=(), seeds=2):
    """Made-up runs of all methods: plain DeepSpeed has 90% or 2 nats, others are worse by `harms`; None: diverged."""
    plain, sign = (90.0, -1) if model == "image" else (2.0, 1)

    def metric(harm, seed):
        return None if harm is None else plain + sign * harm + 0.001 * seed

    runs = [
        Run(
            method=name,
            settings=None if method.settings is None else dict(method.settings),
            seed=seed,
            compressed=metric(harms.get(name, 0.0), seed),
            uncompressed=metric(dict(uncompressed).get(name, harms.get(name, 0.0)), seed),
            training_loss=0.5,
            seconds=12.0,
        )
        for name, method in methods.METHODS.items()
        for seed in range(seeds)
    ]
    return Study(model=model, metric="some", setup=MODELS[model].setup.dump(), machine={"cores": 2}, runs=runs)


def verdicts(study):
    return {found.text: found.holds for found in findings.findings(study)}


@pytest.mark.parametrize("name", MODELS)
def test_four_stages_with_the_boundaries_that_are_promised(name):
    model, x = MODELS[name], MODELS[name].parts().training.inputs[:2]
    crossed = []
    for stage in range(STAGES):
        x = model.layer(stage, 0)(x)
        crossed.append(tuple(x.shape[1:]))
    assert crossed[:-1] == BOUNDARIES[name]


def test_the_groups_and_blocks_of_the_paper():
    for name, kind, blocks in (("image", "BasicBlock", 2), ("text", "GptBlock", 3)):
        for stage in range(STAGES):
            made = MODELS[name].layer(stage, 0).modules()
            assert sum(type(module).__name__ == kind for module in made) == blocks


@pytest.mark.parametrize("name", MODELS)
def test_seeds_give_weights_and_training_learns(name):
    model = MODELS[name]
    some, same, others = (model.layer(1, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(some[key], same[key]) for key in some)
    assert not all(torch.equal(some[key], others[key]) for key in some)
    network = torch.nn.Sequential(*(model.layer(stage, 0) for stage in range(STAGES)))
    optimizer = model.optimizer(network.parameters(), model.setup.lr)
    inputs, labels, _ = next(data.epoch(model.parts().training, model.setup.micro_batch, 0, 0))
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(model.loss(network(inputs), labels))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_attention_sees_nothing_that_comes_later():
    network = torch.nn.Sequential(*(MODELS["text"].layer(stage, 0) for stage in range(STAGES)))
    tokens = torch.randint(256, (1, data.LENGTH))
    changed = tokens.clone()
    changed[0, 40:] = 0
    with torch.no_grad():
        assert torch.equal(network(tokens)[:, :40], network(changed)[:, :40])


@pytest.mark.parametrize("name", MODELS)
def test_an_epoch_has_every_example_once_in_an_order_of_its_own(name):
    model = MODELS[name]
    setup, (training, held_out) = model.setup, model.parts()
    orders = []
    for seed, number in ((0, 0), (0, 0), (0, 1), (1, 0)):
        batches = list(data.epoch(training, setup.micro_batch, seed, number))
        assert {len(batch[0]) for batch in batches} == {setup.micro_batch}
        assert all(torch.equal(inputs, training.inputs[numbers]) for inputs, _, numbers in batches)
        orders.append(torch.cat([numbers for *_, numbers in batches]).tolist())
    assert sorted(orders[0]) == list(range(len(training.inputs)))
    assert orders[0] == orders[1] and orders[2] != orders[0] != orders[3]
    assert len(training.inputs) % (setup.micro_batch * setup.micro_batches) == 0
    assert len(held_out.inputs) % setup.micro_batch == 0


def test_held_out_images_and_windows_are_not_trained_on():
    for model in MODELS.values():
        training, held_out = ({row.numpy().tobytes() for row in part.inputs} for part in model.parts())
        assert not training & held_out


def test_settings_of_every_method_are_valid():
    assert len(methods.METHODS) == 1 + 12 + 6 + 6 + 4 + 4 + 4 + 2
    for method in methods.METHODS.values():
        if method.settings is None:
            assert method.name == "none"
            continue
        read = PipelineSettings.read(json.loads(json.dumps(method.settings)), method.name)
        assert read.per_example and read.forward is not None and read.forward.feedback is not None
        assert read.shared_indices == method.name.startswith("shared ")
        assert (read.backward is None) == (read.shared_indices or read.forward.feedback == "aqsgd")


@pytest.mark.parametrize("model", MODELS)
def test_the_papers_results_give_the_papers_findings(model):
    much = MODELS[model].much
    harms = {f"quantize fw{ahead} bw{back}": much * (5 if back == 2 else 0) for ahead in (8, 4, 2) for back in (8, 6, 4, 2)}
    harms |= {"topk 20%": 0.7 * much, "topk 10%": 0.9 * much, "topk 5%": 3 * much, "topk 2%": None}
    harms |= {f"{memory} topk {k}%": harms[f"topk {k}%"] for memory in ("shared", "ef", "ef21") for k in (20, 10, 5, 2)}
    harms |= {"aqsgd topk 20%": 2 * much, "aqsgd topk 10%": 9 * much}
    uncompressed = {"topk 10%": 4 * much, "topk 5%": 9 * much}
    found = verdicts(study_of(model, harms, uncompressed))
    assert found.pop(ONLY_WITH) is False, "a training that diverged is no better with compression"
    assert (RISE in found) == (model == "text")
    assert set(found.values()) == {True}
    harms["topk 2%"], uncompressed["topk 2%"] = 4 * much, 10 * much
    assert verdicts(study_of(model, harms, uncompressed))[ONLY_WITH] is True


def test_findings_that_do_not_hold():
    harms = {f"quantize fw{strong} bw8": 9.0 for strong in (4, 2)} | {"topk 10%": 5.0, "topk 5%": 5.0, "ef topk 10%": 1.0}
    harms |= {"shared topk 50%": None, "aqsgd topk 50%": 7.0}
    found = verdicts(study_of("image", harms, {"ef21 topk 2%": 9.0}))
    assert not any(found[text] for text in (GRADIENTS, STRONGEST, ONLY_WITH, NO_BETTER, EF21, AQ, SHARED))
    assert found[EF] is True


def test_findings_without_their_runs_stay_open():
    study = study_of("text", {})
    fewer = study.model_copy(update={"runs": [run for run in study.runs if "topk 2%" not in run.method]})
    found = verdicts(fewer)
    assert found[STRONGEST] is None and found[GRADIENTS] is not None


def test_report():
    text = report.markdown(study_of("image", {"topk 2%": None, "topk 5%": 2.5}))
    assert "| none | 90.0 ± 0.0 | 90.0 ± 0.0 | 0.500 ± 0.000 | 2 |" in text
    assert "| topk 5% | 87.5 ± 0.0 |" in text and "| topk 2% | diverged | diverged |" in text
    assert "| the paper found | holds here | figures |" in text
    assert all(line.count("|") in (0, 4, 6) for line in text.splitlines())
    assert "no runs yet" in report.markdown(study_of("text", {}, seeds=0))


def test_studies_go_on_where_they_stopped(tmp_path):
    study, path = study_of("text", {}, seeds=1), tmp_path / "text.json"
    with pytest.raises(FileError, match="no results"):
        load_studies(tmp_path)
    assert open_study(path, study) == study
    study.save(path)
    again = open_study(path, study.model_copy(update={"runs": []}))
    assert again.done() == {(name, 0) for name in methods.METHODS}
    assert len(again.having(study.runs[0]).runs) == len(study.runs) + 1
    with pytest.raises(FileError, match="move it away"):
        open_study(path, study.model_copy(update={"setup": {"epochs": 1}}))
    assert [found.model for found in load_studies(tmp_path)] == ["text"]


def test_a_training_that_diverged_is_written_as_none():
    run = study_of("text", {"topk 2%": None}).runs[0].model_copy(update={"compressed": float("nan")})
    assert Run.model_validate(run.model_dump()).compressed is None


def test_a_start_is_made_once_and_loaded_by_stages(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "docstrings", lambda: torch.arange(5000) % 256)
    monkeypatch.setattr("benchmarks.pipeline_quality.start.docstrings", data.docstrings)
    model = MODELS["text"]
    assert make_start(model, tmp_path, 0) is None
    path = make_start(model, tmp_path, 2)
    written = path.stat().st_mtime_ns
    assert make_start(model, tmp_path, 2).stat().st_mtime_ns == written
    for stage in range(STAGES):
        some, others = (model.layer(stage, seed, path).state_dict() for seed in (0, 1))
        assert all(torch.equal(some[key], others[key]) for key in some)


def test_setups_survive_json():
    for model in MODELS.values():
        assert Setup(**json.loads(json.dumps(model.setup.dump()))) == model.setup
