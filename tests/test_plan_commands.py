"""`espresso plan` and `what-if` on profile files alone: what they print, what they write, and what they leave as it was."""

import json
import math
import subprocess
import sys

import pytest
from jobs import environment
from planner_cases import codecs_of, several
from profile_files import CONFIG, NAMES, SIZES, nested_case, plan_words, planned, slow_case

from espresso_ds.cli import main
from espresso_ds.core.option import Level, Option
from espresso_ds.core.plan import load_plan_file


def subprocess_of(words, before="", after=""):
    """The command in a Python of its own: (what it printed, what it said on stderr)."""
    code = f"import sys\nfrom espresso_ds.cli import main\n{before}\nmain(sys.argv[1:])\n{after}"
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


def strictly(text):
    """The one JSON value that `text` is, without NaN and infinities."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_planning_imports_nothing_that_trains(tmp_path):
    slow = slow_case(tmp_path)
    _, said = subprocess_of(plan_words(slow), after="print('loaded', *sys.modules, file=sys.stderr)")
    loaded = {name.partition(".")[0] for name in said.partition("loaded ")[2].split()}
    assert "espresso_ds" in loaded and "numpy" in loaded
    assert not loaded & {"torch", "deepspeed", "mpi4py", "transformers", "accelerate", "matplotlib"}
    assert (slow / "plan.json").exists()


def test_json_is_one_object_of_finite_numbers_that_are_the_plans(tmp_path):
    slow = slow_case(tmp_path)
    printed, _ = subprocess_of(plan_words(slow, "--json"))
    shown = strictly(printed)
    assert all(math.isfinite(value) for value in shown.values() if not isinstance(value, str))
    plan = load_plan_file(slow / "plan.json")[2]
    p = plan.predicted
    assert {key: shown[key] for key in type(p).model_fields} == p.model_dump()
    assert shown["seal"] == plan.seal and shown["hierarchical_tensors"] == 0
    assert shown["speedup_over_stock"] == pytest.approx(p.stock_s / p.planned_s)
    assert shown["speedup_over_uncompressed"] == pytest.approx(p.uncompressed_s / p.planned_s) and p.planned_s < p.uncompressed_s
    assert shown["certified_gap"] == pytest.approx(p.planned_s / p.lower_bound_s - 1)
    lossy = [tensor for tensor in plan.tensors if Option.parse(tensor.option).compresses]
    assert (shown["tensors"], shown["units"]) == (len(NAMES), len({tensor.unit for tensor in plan.tensors}))
    assert (shown["compressed_tensors"], shown["compressed_numel"]) == (len(lossy), sum(t.numel for t in lossy)) and lossy


FAULTS = {
    "torn": (lambda text: text[: len(text) // 2], "torn or not JSON"),
    "empty": (lambda text: "", "is empty"),
    "not a number": (lambda text: text.replace('"ready_s": 0.02', '"ready_s": NaN'), "ready_s"),
    "negative": (lambda text: text.replace('"ready_s": 0.02', '"ready_s": -0.02'), "ready_s"),
    "milliseconds": (lambda text: text.replace('"ready_s": 0.12', '"ready_s": 120'), "give all times in seconds"),
    "of another world": (lambda text: text.replace('"world_size": 2', '"world_size": 4'), "traced with 4 ranks"),
    "without tensors": (lambda text: json.dumps({**json.loads(text), "tensors": []}), "holds no tensors"),
    "of a newer schema": (lambda text: text.replace('"schema_version": 1', '"schema_version": 2'), "schema_version 2"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_trace_is_one_line_and_leaves_the_old_plan_alone(tmp_path, fault, capsys):
    slow = slow_case(tmp_path)
    planned(slow)
    before, names = (slow / "plan.json").read_bytes(), sorted(slow.iterdir())
    file = slow / "plan.profiles" / "trace.json"
    spoil, says = FAULTS[fault]
    spoiled = spoil(file.read_text())
    assert spoiled != file.read_text()
    file.write_text(spoiled)
    capsys.readouterr()
    with pytest.raises(SystemExit, match=says) as stopped:
        main(plan_words(slow))
    assert "\n" not in stopped.value.code and stopped.value.code.startswith("espresso: ")
    assert capsys.readouterr().out == ""
    assert (slow / "plan.json").read_bytes() == before and sorted(slow.iterdir()) == names


CONSTRAINED = {
    "exact": ({"constraints": {"exact": ["*norm*", "embed.*"]}}, lambda lossy: lossy <= {NAMES[0], NAMES[2], NAMES[4]}),
    "none": ({"constraints": {"max_compressions": 0}}, lambda lossy: not lossy),
    "memory": ({"constraints": {"residual_bytes": 4 * 2**20}}, lambda lossy: sum(SIZES[NAMES.index(n)] for n in lossy) <= 2**20),
    "budget": ({"error_budget": 0.2}, lambda lossy: sum(SIZES[NAMES.index(n)] for n in lossy) * 0.5 <= 0.2 * sum(SIZES)),
    "forbid": ({"constraints": {"forbid": ["AG.flat"]}}, lambda lossy: True),
}


@pytest.mark.parametrize("kind", CONSTRAINED)
def test_what_the_block_asks_for_is_kept_to_and_stays_in_the_file(tmp_path, kind):
    slow = slow_case(tmp_path)
    block, kept = CONSTRAINED[kind]
    free = {tensor.name for tensor in planned(slow).tensors if Option.parse(tensor.option).compresses}
    assert len(free) >= 3, free
    (slow / "ds.json").write_text(json.dumps({**CONFIG, "espresso": block}))
    plan = planned(slow)
    lossy = {tensor.name for tensor in plan.tensors if Option.parse(tensor.option).compresses}
    assert kept(lossy)
    assert kind in ("none", "forbid") or lossy, "it forbids some, not all"
    assert kind != "forbid" or not any("AG.flat" in tensor.option for tensor in plan.tensors)
    config, written, _ = load_plan_file(slow / "plan.json")
    assert {key: value for key, value in config.items() if key != "espresso"} == CONFIG
    given = written.model_dump(mode="json")
    assert all(given["constraints"][key] == value for key, value in block.get("constraints", {}).items())
    assert written.error_budget == block.get("error_budget")


def test_hierarchical_options_unless_flat_ones_are_asked_for(tmp_path, capsys):
    nested = nested_case(tmp_path)
    flat = planned(nested, "--flat")
    assert load_plan_file(nested / "plan.json")[1].constraints.flat_only
    assert {Option.parse(tensor.option).levels for tensor in flat.tensors} == {frozenset({Level.FLAT})}
    capsys.readouterr()
    whole = planned(nested, "--json")
    shown = strictly(capsys.readouterr().out.splitlines()[-1])
    assert any(Level.INTER in Option.parse(tensor.option).levels for tensor in whole.tensors)
    assert shown["hierarchical_tensors"] > 0
    assert whole.predicted.planned_s < 0.9 * flat.predicted.planned_s
    assert whole.predicted.uncompressed_s < flat.predicted.uncompressed_s


def test_what_if_prints_one_object_whose_measured_point_is_the_plan(tmp_path):
    slow = slow_case(tmp_path)
    plan = planned(slow)
    printed, _ = subprocess_of(["what-if", str(slow / "plan.json"), "--bandwidth", "0.5..2", "--points", "3", "--json"])
    shown = strictly(printed)
    assert [point["inter_speed"] for point in shown["points"]] == pytest.approx([0.5, 1, 2])
    for point in shown["points"]:
        assert all(math.isfinite(value) for value in point["predicted"].values())
    measured = shown["points"][1]["predicted"]
    assert measured["compute_s"] == plan.predicted.compute_s
    assert measured["stock_s"] == pytest.approx(plan.predicted.stock_s, rel=1e-6)
    assert measured["planned_s"] == pytest.approx(plan.predicted.planned_s, rel=0.02)
    assert len(shown["answers"]) == 4 and all(answer["words"] for answer in shown["answers"])


def test_a_thrifty_choice_of_two_codecs_is_written_with_its_codec(tmp_path):
    """Both codecs are in the plan, and each tensor says which is its own."""
    slow = slow_case(tmp_path)
    both = several(codecs_of(encode=2e-9, decode=1e-9, share=0.02), codecs_of(encode=2e-9, decode=1e-9, share=0.5))
    both.save(slow / "plan.profiles" / "compressors.json")
    plan = planned(slow, "--thrift", "0")
    assert plan.compressors == tuple(codec.compressor for codec in both.codecs)
    assert {tensor.codec for tensor in plan.tensors if Option.parse(tensor.option).compresses} == {0}, (
        "the other one sends 25 times as much"
    )
    with pytest.raises(SystemExit, match="thrift"):
        main(plan_words(slow, "--thrift", "2"))


@pytest.mark.parametrize("name", ["no/such/place/plan.json", "plan.profiles"], ids=["no directory", "a directory"])
def test_where_no_plan_can_be_written_is_one_clear_line(tmp_path, name):
    slow = slow_case(tmp_path)
    with pytest.raises(SystemExit, match=r"^espresso: .*" + name):
        main([*plan_words(slow), "-o", str(slow / name)])


@pytest.mark.parametrize("words", [["--compressor", "dgc"], ["--bits", "2"], ["--alternative", "fp16"]], ids=" ".join)
def test_a_profile_of_codecs_and_the_wish_for_others_are_not_both_taken(words, tmp_path):
    out = tmp_path / "plan.json"
    given = ["--ds-config", str(tmp_path / "ds.json"), "--compressors", "measured.json", "-o", str(out)]
    with pytest.raises(SystemExit) as ended:
        main(["prepare", *given, *words, "train.py"])
    said = str(ended.value)
    assert "--compressors measured.json" in said and words[0] in said and "give one of the two" in said
    assert list(tmp_path.iterdir()) == []
