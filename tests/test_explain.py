"""`espresso explain`: the tables, the runner-up, the certificate and both kinds of pictures, from files alone."""

import itertools
import json
import shutil

import pytest
from profile_files import NAMES, nested_case, planned, slow_case

from espresso_ds.cli import main
from espresso_ds.core.option import Option

WIDE = "400"
PREDICTED = {"DeepSpeed": "stock_s", "uncompressed, overlapped": "uncompressed_s", "planned": "planned_s"}


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", WIDE)


def explain(capsys, folder, *more):
    capsys.readouterr()
    main(["explain", str(folder / "plan.json"), *map(str, more)])
    return capsys.readouterr().out


def column(text, title):
    """What stands below a column's title at the end of each row, its lines joined."""
    lines = text.splitlines()
    head = next(number for number, line in enumerate(lines) if line.rstrip().endswith(title))
    start = lines[head].rindex(title)
    return " ".join(" ".join(line[start:] for line in lines[head + 1 :]).split())


def test_the_plan_with_runner_ups_and_certificate(tmp_path, capsys):
    slow = slow_case(tmp_path)
    plan = planned(slow)
    said = explain(capsys, slow)
    assert all(name in said for name in NAMES)
    assert "No strategy is faster" in said
    gap = plan.predicted.gap
    assert (f"within {gap:.1%} of the best" in said) == (gap >= 5e-4)
    for row in (
        "DeepSpeed as it is",
        "uncompressed, overlapped",
        "this plan",
        "lower bound of all strategies",
        "no synchronisation",
    ):
        assert row in said
    reasons = column(said.partition("What the step waits for")[0], "why")
    assert all(unit[0].why in reasons for unit in plan.units())
    assert any("next best" in unit[0].why for unit in plan.units())
    assert "What the step waits for" in said and "optimizer" in said


def test_a_tensor_with_its_runner_up(tmp_path, capsys):
    slow = slow_case(tmp_path)
    plan = planned(slow)
    tensor = next(tensor for tensor in plan.tensors if Option.parse(tensor.option).compresses)
    said = explain(capsys, slow, tensor.name)
    assert tensor.option in said and tensor.why in said and "next best" in said
    assert f"{tensor.numel:,} elements of float32" in said and "topk density=0.01" in said
    assert not any(name in said for name in NAMES if name not in {t.name for t in plan.tensors if t.unit == tensor.unit})
    with pytest.raises(SystemExit, match=r"no tensor 'h\.1\.fc\.wieght'; did you mean 'h\.1\.fc\.weight'\?"):
        explain(capsys, slow, "h.1.fc.wieght")


def test_tables_are_printed_where_no_profiles_lie_beside_the_plan(tmp_path, capsys):
    slow = slow_case(tmp_path)
    planned(slow)
    with_profiles = explain(capsys, slow)
    shutil.move(slow / "plan.profiles", tmp_path / "elsewhere")
    alone = explain(capsys, slow)
    assert alone and with_profiles.startswith(alone.rstrip()) and "waits for" not in alone
    assert explain(capsys, slow, "--profiles", tmp_path / "elsewhere") == with_profiles
    with pytest.raises(SystemExit, match=r"trace\.json: no such model trace"):
        explain(capsys, slow, "--chrome", tmp_path / "t.json")
    assert not (tmp_path / "t.json").exists()


def test_pictures_are_written_in_the_format_of_their_suffix(tmp_path, capsys):
    slow = slow_case(tmp_path)
    planned(slow)
    for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        file = tmp_path / f"picture{suffix}"
        assert str(file) in explain(capsys, slow, "--picture", file)
        assert file.read_bytes().startswith(magic)


def check_chrome(plan, file):
    """Three processes that end when the plan says; on no thread do two spans overlap."""
    trace = json.loads(file.read_text())
    events = trace["traceEvents"]
    titles = {event["args"]["name"]: event["pid"] for event in events if event["name"] == "process_name"}
    assert set(titles) == set(PREDICTED) and len(set(titles.values())) == 3
    for title, pid in titles.items():
        spans = [event for event in events if event["ph"] == "X" and event["pid"] == pid]
        assert spans and all(event["dur"] >= 0 and event["ts"] >= 0 for event in spans)
        end_us = max(event["ts"] + event["dur"] for event in spans)
        assert end_us == pytest.approx(getattr(plan.predicted, PREDICTED[title]) * 1e6, rel=1e-9), title
        threads = {(e["tid"]) for e in events if e["name"] == "thread_name" and e["pid"] == pid}
        for thread in {event["tid"] for event in spans}:
            assert thread in threads
            mine = sorted((event["ts"], event["ts"] + event["dur"]) for event in spans if event["tid"] == thread)
            assert all(before[1] <= after[0] * (1 + 1e-9) + 1e-6 for before, after in itertools.pairwise(mine))
    assert {event["ph"] for event in events} == {"M", "X"}


def test_the_chrome_trace_ends_when_the_plan_says(tmp_path, capsys):
    slow = slow_case(tmp_path)
    plan, file = planned(slow), tmp_path / "t.json"
    explain(capsys, slow, "--chrome", file)
    check_chrome(plan, file)
    names = {event["name"] for event in json.loads(file.read_text())["traceEvents"]}
    assert any(name.startswith("C.cpu ") for name in names) and "backward" in names


@pytest.mark.parametrize("asked", [(), ("--flat",), ("--uncompressed",)], ids=str)
def test_timelines_are_those_of_the_plan_whatever_was_asked_for(tmp_path, capsys, asked):
    """The uncompressed plan beside it keeps to what the plan kept to: with --flat it is flat."""
    nested = nested_case(tmp_path)
    plan, file = planned(nested, *asked), tmp_path / "t.json"
    explain(capsys, nested, "--chrome", file)
    check_chrome(plan, file)


@pytest.mark.parametrize(
    ("flag", "name"),
    [("--picture", "no/such/place/file.png"), ("--chrome", "no/such/place/file.json"), ("--picture", "file.no_such_format")],
)
def test_where_nothing_can_be_written_is_one_clear_line(tmp_path, capsys, flag, name):
    slow = slow_case(tmp_path)
    planned(slow)
    with pytest.raises(SystemExit, match="espresso: "):
        explain(capsys, slow, flag, tmp_path / name)
