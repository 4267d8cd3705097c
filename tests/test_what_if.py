"""What-if curves: with a step whose crossings are known by algebra, and the command with the planner itself."""

import json
import math
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_cases import codecs_of, trace_of
from rich.console import Console

from espresso_ds.cli import parser
from espresso_ds.core.errors import EspressoError, FileError
from espresso_ds.core.option import Level, Task
from espresso_ds.core.plan import Prediction
from espresso_ds.core.profile import Link
from espresso_ds.planner.routine_models import nominal_cluster
from espresso_ds.planner.what_if import WhatIf, doublings, geometric, people_bit_per_s, what_if
from espresso_ds.planner.what_if_render import draw, table

INTRA = Link(alpha_s=1e-5, beta_s_per_byte=8 / 800e9, fit_error=0.0)
INTER = Link(alpha_s=0.0, beta_s_per_byte=8 / 10e9, fit_error=0.0)
COMPUTE_S, NBYTES, RATIO, CODEC_S = 0.1, 1e8, 0.01, 0.02


def step(cluster):
    """Compute, then a flat allreduce. The plan sends a hundredth of the bytes and pays for the codec, or does not compress."""
    cost = next(c for c in cluster.routines if (c.routine, c.level) == (Task.ALLREDUCE, Level.FLAT))
    sent = [cost.alpha_s + cost.beta_s_per_byte * share * NBYTES for share in (1, RATIO)]
    overlapped, packed = COMPUTE_S + sent[0] / 2, COMPUTE_S + CODEC_S + sent[1] / 2
    return Prediction(
        compute_s=COMPUTE_S,
        stock_s=COMPUTE_S + sent[0],
        uncompressed_s=overlapped,
        planned_s=min(overlapped, packed),
        uncompressed_bytes=int(NBYTES),
        planned_bytes=int(RATIO * NBYTES),
        lower_bound_s=COMPUTE_S,
        free_compression_s=packed - CODEC_S,
    )


def curve(cluster, axis, values, **more):
    return what_if(cluster, axis, values, step, model="m", **more)


def test_answers_over_bandwidth_are_where_algebra_puts_them():
    cluster = nominal_cluster(4, 1, INTRA, INTER)
    found = curve(cluster, "bandwidth", geometric(0.01, 1000, 400), target=0.8)
    full_s = 2 * 3 / 4 * NBYTES * INTER.beta_s_per_byte  # at the measured bandwidth
    late_s = COMPUTE_S / 0.8 - COMPUTE_S
    answers = [answer for answer in found.answers if answer.holds != "up to"]
    assert [answer.holds for answer in answers] == ["from"] * 3
    assert [answer.at for answer in answers] == pytest.approx(
        [full_s / late_s, full_s / 2 / late_s, RATIO * full_s / 2 / (late_s - CODEC_S)], rel=0.01
    )
    assert people_bit_per_s(answers[0].at * 10e9) in answers[0].words
    (pays,) = [answer for answer in found.answers if answer.holds == "up to"]
    # The codec's time against 99% of half the transfer; saving 1% of the step ends slightly before.
    sent = [
        f * (1 - RATIO) / 2 * full_s - CODEC_S - 0.01 * (COMPUTE_S + f * full_s / 2)
        for f in (1 / pays.at * 0.98, 1 / pays.at * 1.02)
    ]
    assert sent[0] < 0 < sent[1]


def test_points_hold_absolute_and_relative_bandwidth_in_order():
    found = curve(nominal_cluster(2, 2, INTRA, INTER), "bandwidth", [10, 0.1, 1, 1])
    assert [point.inter_speed for point in found.points] == [0.1, 1, 10]
    assert [point.inter_bit_per_s for point in found.points] == pytest.approx([1e9, 10e9, 100e9])
    assert [point.ranks for point in found.points] == [4, 4, 4]
    times = [point.predicted.stock_s for point in found.points]
    assert times == sorted(times, reverse=True)


def test_answers_over_nodes_reach_thousands_of_ranks():
    cluster = nominal_cluster(2, 8, INTRA, Link(alpha_s=1e-3, beta_s_per_byte=8 / 100e9, fit_error=0.0))
    found = curve(cluster, "nodes", doublings(1, 1024), target=0.85)
    assert [point.nodes for point in found.points] == [1 << n for n in range(11)] and found.points[-1].ranks == 8192
    answers = found.answers
    assert answers[0].holds == "up to" and f"{answers[0].at:.0f} node" in answers[0].words
    keeps = [point.nodes for point in found.points if COMPUTE_S / point.predicted.stock_s >= 0.85]
    assert max(keeps) <= answers[0].at < 2 * max(keeps) and answers[0].at == int(answers[0].at)


def test_what_never_and_what_always_holds_is_said_with_the_end_of_the_curve():
    found = curve(nominal_cluster(2, 1, INTRA, INTER), "bandwidth", [0.001, 0.01])
    assert [answer.holds for answer in found.answers] == ["never", "never", "never", "everywhere"]
    assert all("at 100 Mbit/s (0.01 x measured)" in answer.words for answer in found.answers)
    fast = curve(nominal_cluster(2, 1, INTRA, INTER), "bandwidth", [1e5, 1e6])
    assert [answer.holds for answer in fast.answers] == ["everywhere"] * 3 + ["never"]
    unnamed = nominal_cluster(2, 1, INTRA, INTER).model_copy(update={"links": {}})
    assert "0.01 x the measured bandwidth" in curve(unnamed, "bandwidth", [0.001, 0.01]).answers[0].words


def test_a_dip_does_not_count():
    """From where on: where the last points hold it, not where the first one does."""
    times = iter([0.101, 0.2, 0.2, 0.101])
    found = what_if(
        nominal_cluster(2, 1, INTRA, INTER),
        "bandwidth",
        [1, 2, 4, 8],
        lambda cluster: step(cluster).model_copy(update={"stock_s": next(times)}),
        model="m",
    )
    assert found.answers[0].holds == "from" and 4 < found.answers[0].at <= 8


def test_a_curve_is_a_record_that_is_read_back():
    found = curve(nominal_cluster(2, 2, INTRA, INTER), "nodes", [1, 2, 4])
    assert WhatIf.read(json.loads(found.model_dump_json()), "x") == found


@pytest.mark.parametrize(
    ("axis", "values", "more", "fault"),
    [
        ("bandwidth", [0.0], {}, "inter_speed is 0"),
        ("nodes", [0], {}, "nodes is 0"),
        ("nodes", [], {}, "points"),
        ("nodes", [2], {"target": 1.5}, "target is 1.5"),
        ("nodes", [2], {"worth": 0.0}, "worth is 0"),
    ],
)
def test_senseless_questions_are_refused(axis, values, more, fault):
    with pytest.raises(FileError, match=fault):
        curve(nominal_cluster(2, 2, INTRA, INTER), axis, values, **more)


def test_one_node_has_no_bandwidth_to_vary():
    with pytest.raises(FileError, match=r"one node, node0.*two nodes"):
        curve(nominal_cluster(1, 2, INTRA, INTER), "bandwidth", [1, 2])


@given(st.floats(1e-6, 1e6), st.floats(1, 1e6), st.integers(2, 30))
def test_geometric_ranges_ascend_between_their_ends(low, factor, count):
    values = geometric(low, low * factor, count)
    assert values == sorted(set(values)) and (values[0], values[-1]) == (low, low * factor)
    assert (1.0 in values) or not low < 1 < low * factor


def test_doublings():
    assert doublings(1, 8) == [1, 2, 4, 8] and doublings(3, 20) == [3, 4, 8, 16, 20] and doublings(5, 5) == [5]
    for ends in ((0, 4), (4, 2)):
        with pytest.raises(FileError, match="no numbers of nodes"):
            doublings(*ends)


@pytest.mark.parametrize(("low", "high", "count"), [(0, 1, 5), (2, 1, 5), (1, 2, 1), (1, math.inf, 5)])
def test_ranges_that_are_none(low, high, count):
    with pytest.raises(FileError, match="give a range"):
        geometric(low, high, count)


@pytest.mark.parametrize(("axis", "values"), [("bandwidth", [0.1, 1, 10]), ("nodes", [1, 2, 64])])
def test_table_and_picture(tmp_path, axis, values):
    found = curve(nominal_cluster(2, 2, INTRA, INTER), axis, values)
    console = Console(width=160, record=True, file=open("/dev/null", "w"))
    console.print(table(found))
    text = console.export_text()
    for point in found.points:
        assert f"{point.predicted.stock_s / point.predicted.planned_s:.2f}x" in text
        assert (people_bit_per_s(point.inter_bit_per_s) if axis == "bandwidth" else f"{point.ranks}") in text
    assert all(answer.words in text for answer in found.answers)
    draw(found, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def files(tmp_path):
    """Arguments that name a trace, a cluster of two nodes of two ranks, and a codec."""
    rows = [(int(4e5), 0.01 * number) for number in range(1, 4)]
    trace_of(rows, world=4, node=2, device="cuda", forward_s=0.01, after_s=0.001).save(tmp_path / "t.json")
    nominal_cluster(2, 2, INTRA, INTER.model_copy(update={"alpha_s": 1e-4})).save(tmp_path / "c.json")
    codecs_of(device="gpu", encode=1e-10, decode=1e-10, fixed_s=1e-5).save(tmp_path / "p.json")
    named = zip(("--trace", "--cluster", "--compressors"), ("t.json", "c.json", "p.json"), strict=True)
    return [word for flag, name in named for word in (flag, str(tmp_path / name))]


def command(*arguments, name="what-if"):
    args = parser().parse_args([name, *map(str, arguments)])
    args.run(args)


@pytest.mark.parametrize(
    "axis", [["--bandwidth", "10mbit..1gbit", "--points", "3"], ["--nodes", "1..4"], ["--bandwidth", ".5..2"]]
)
def test_the_command_plans_for_every_point(files, tmp_path, capsys, axis):
    command(*files, *axis, "--json", "--picture", tmp_path / "p.png")
    found = WhatIf.read(json.loads(capsys.readouterr().out), "printed")
    times = [point.predicted for point in found.points]
    assert all(p.compute_s <= p.lower_bound_s * (1 + 1e-9) and p.lower_bound_s <= p.planned_s * (1 + 1e-9) for p in times)
    assert all(p.planned_s <= p.stock_s * (1 + 1e-9) for p in times)
    if "10mbit..1gbit" in axis:
        assert [point.inter_bit_per_s for point in found.points] == pytest.approx([1e7, 1e8, 1e9])
        assert times[0].stock_s > times[1].stock_s > times[2].stock_s
    assert (tmp_path / "p.png").exists()


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        (["--bandwidth", "1"], "two ends"),
        (["--bandwidth", "1..fast"], "'fast' is neither"),
        (["--nodes", "1..x"], "two numbers"),
        (["--nodes", "0..4"], "no numbers of nodes"),
        (["--picture", "/none/p.png"], "directory does not exist"),
    ],
)
def test_wrong_arguments_are_one_clear_line(files, wrong, fault):
    with pytest.raises(EspressoError, match=fault):
        command(*files, *wrong)


def test_a_plan_is_enough_where_its_profiles_lie_beside_it(files, tmp_path, capsys):
    """And what its block asks for is kept to: here no tensor may be compressed."""
    (tmp_path / "ds.json").write_text(json.dumps({"espresso": {"constraints": {"max_compressions": 0}}}))
    command("--ds-config", tmp_path / "ds.json", *files, "-o", tmp_path / "plan.json", name="plan")
    beside = tmp_path / "plan.profiles"
    beside.mkdir()
    for flag, file in zip(files[::2], files[1::2], strict=True):
        shutil.copy(file, beside / f"{flag[2:]}.json")
    capsys.readouterr()
    shown = []
    for start in ([tmp_path / "plan.json"], files):
        command(*start, "--flat", "--bandwidth", "10mbit..20mbit", "--points", 2, "--json")
        shown.append(WhatIf.read(json.loads(capsys.readouterr().out), "printed").points[0].predicted)
    bound, free = shown
    assert bound.planned_bytes == bound.uncompressed_bytes > 2 * free.planned_bytes


def test_files_that_are_missing_are_named(files):
    with pytest.raises(FileError, match=r"give a plan\.json whose profiles lie beside it, or --cluster, --compressors"):
        command(*files[:2])
