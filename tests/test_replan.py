"""`espresso replan` from files to files."""

import json

import pytest
from profile_files import planned, slow_case
from test_refit import World, run_in, true_step

from espresso_ds.cli import main
from espresso_ds.core.option import Option
from espresso_ds.core.plan import load_plan_file
from espresso_ds.core.profile import ClusterProfile, CompressorProfile, ModelTrace
from espresso_ds.planner.refit_profiles import Profiles
from espresso_ds.planner.refit_record import Refit


def profiles_in(folder):
    kinds = {"trace": ModelTrace, "cluster": ClusterProfile, "compressors": CompressorProfile}
    return Profiles(*(record.load(folder / f"{kind}.json") for kind, record in kinds.items()))


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A plan, a true world in which codecs are ten times as slow, and a run of the plan in it."""
    monkeypatch.setenv("COLUMNS", "200")
    folder = slow_case(tmp_path)
    plan = planned(folder)
    truth = World(encode=10.0, decode=10.0, link_contention=0.0).of(profiles_in(folder / "plan.profiles"))
    for name, run in run_in(plan, truth).items():
        run.save(folder / name)
    return folder, plan, truth


def words(folder, *more):
    runs = [folder / f"run-{rank}.json" for rank in range(2)]
    return [str(word) for word in ("replan", folder / "plan.json", "--run", *runs, "-o", folder / "plan2.json", *more)]


def test_a_run_makes_a_better_plan_with_which_everything_works(measured, capsys):
    folder, plan, truth = measured
    config, block, _ = load_plan_file(folder / "plan.json")
    main(words(folder))
    said = capsys.readouterr().out
    assert "corrected prediction" in said and "encoding, topk" in said and "plan2.json" in said
    config2, block2, new = load_plan_file(folder / "plan2.json")
    assert {k: v for k, v in config2.items() if k != "espresso"} == {k: v for k, v in config.items() if k != "espresso"}
    assert block2.model_copy(update={"plan": None}) == block.model_copy(update={"plan": None})
    assert true_step(new, truth) < true_step(plan, truth)
    assert new.predicted.planned_s == pytest.approx(true_step(new, truth), rel=0.1)
    found = Refit.load(folder / "plan2.profiles" / "refit.json")
    assert found.plan == plan.seal and found.ranks == (0, 1)
    assert new.profiles == {k: v.fingerprint for k, v in profiles_in(folder / "plan2.profiles")._asdict().items()}
    main(["explain", str(folder / "plan2.json")])
    main(["what-if", str(folder / "plan2.json"), "--bandwidth", "0.5..2"])


@pytest.mark.parametrize("asked", ["uncompressed", "exact"])
def test_old_decisions_that_are_no_longer_allowed_are_not_kept(measured, capsys, asked):
    """However much slower the new ones are."""
    folder, plan, _ = measured
    assert any(Option.parse(tensor.option).compresses for tensor in plan.tensors)
    if asked == "exact":
        whole = json.loads((folder / "plan.json").read_text())
        whole["espresso"]["constraints"]["exact"] = ["*"]
        (folder / "plan.json").write_text(json.dumps(whole))
    main(words(folder, *(["--uncompressed"] if asked == "uncompressed" else [])))
    new = load_plan_file(folder / "plan2.json")[2]
    assert not any(Option.parse(tensor.option).compresses for tensor in new.tensors)
    assert "are kept" not in capsys.readouterr().out


def test_as_json(measured, capsys):
    folder, _, _ = measured
    capsys.readouterr()
    main(words(folder, "--json"))
    said = json.loads(capsys.readouterr().out)
    assert said["plan"]["kept"] is False and said["plan"]["old_s"] > said["plan"]["planned_s"]
    assert said["refit"]["rows"][0]["what"] == "step"


def test_the_plan_that_ran_is_not_overwritten(measured):
    folder, plan, _ = measured
    with pytest.raises(SystemExit, match="would overwrite the plan that ran"):
        main([*words(folder)[:-1], str(folder / "plan.json")])
    assert load_plan_file(folder / "plan.json")[2] == plan


def test_profiles_may_lie_elsewhere(measured):
    folder, _, _ = measured
    away = (folder / "plan.profiles").rename(folder / "elsewhere")
    with pytest.raises(SystemExit, match="no such model trace"):
        main(words(folder))
    assert not (folder / "plan2.json").exists()
    main(words(folder, *(word for kind in Profiles._fields for word in (f"--{kind}", away / f"{kind}.json"))))
    assert (folder / "plan2.json").exists()
