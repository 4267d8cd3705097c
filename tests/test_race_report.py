"""The race's report: every figure of bars and tables against one worked out by hand from synthetic results."""

import math
import re

import pytest
from rich.console import Console

from benchmarks.race import bars, pictures, report
from benchmarks.race.results import BOUND, OURS, CellResult, Losses, Variant, in_order, load_cells
from espresso_ds.core.errors import FileError


def variant(kind, *step_s, **fields):
    return {"kind": kind, "step_s": list(step_s), **fields}


def cell(model="gpt2-30m", nodes=2, ranks=1, rate="200mbit", losses=None, drop=(), **variants):
    """Compute only 1 s, plain 5 s, fp16 2.6 s, bf16 2.4 s, PowerSGD 1.2 s, planned 1.05 s (1.0 predicted)."""
    given = {
        "compute only": variant("bound", 0.9, 1.0, 1.3, sent_bytes=0),
        "deepspeed fp32": variant("peer", 5.0, 4.0, 9.0, sent_bytes=91e6),
        "ddp fp16": variant("peer", 2.6),
        "ddp bf16": variant("peer", 2.4),
        "ddp powersgd 1": variant("peer", 1.2, 1.2, 1.4),
        "espresso": variant(
            "ours", 1.05, 1.0, 1.1, predicted_s=1.0, exposed_communication_s=0.04, exposed_compression_s=0.01, sent_bytes=3.5e6
        ),
        "espresso all": variant("crippled", 1.0, predicted_s=1.25),
    }
    given = {name: each for name, each in (given | variants).items() if name not in drop}
    default = {"espresso": {"steps": 60, "final": [2.0, 3.0]}, "ddp powersgd 1": {"steps": 60, "final": [2.4, 2.8]}}
    return CellResult.model_validate(
        {
            "model": model,
            "nodes": nodes,
            "ranks_per_node": ranks,
            "rate": rate,
            "machine": {"processor": "some", "cores": 2, "load_average_1min": 0.5, "taken": "2026-01-01"},
            "rounds": 3,
            "steps_per_turn": 1,
            "variants": given,
            "losses": default if losses is None else losses,
        }
    )


def found(cells, bar):
    return {check.cell: check for check in bars.checks(cells) if check.bar == bar}


def shown(tables):
    console = Console(width=250, record=True, file=open("/dev/null", "w"))
    for table in tables:
        console.print(table)
    return console.export_text()


def test_medians_and_quartiles():
    three = Variant.model_validate(variant("peer", 1.2, 1.2, 1.4))
    assert three.median_s == 1.2
    assert three.quartiles_s == pytest.approx((1.2, 1.3))
    assert Variant.model_validate(variant("peer", 2.0)).quartiles_s == (2.0, 2.0)


def test_ratios_are_of_medians():
    one = cell()
    assert bars.speed_up(one, "deepspeed fp32") == pytest.approx(5.0 / 1.05)
    assert bars.speed_up(one, "deepspeed fp32", over="ddp bf16") == pytest.approx(5.0 / 2.4)
    assert bars.above_bound(one) == pytest.approx(0.05)
    assert bars.off_prediction(one) == pytest.approx(1.0 / 1.05 - 1)
    assert bars.off_prediction(one, "espresso all") == pytest.approx(0.25)
    assert bars.off_prediction(one, "ddp fp16") is None


def test_crippled_plans_and_the_bound_are_no_peers():
    assert cell().fastest() == "ddp powersgd 1"
    assert cell(drop=["ddp powersgd 1"]).fastest() == "ddp bf16"
    assert cell().fastest(("ddp fp16", "ddp bf16")) == "ddp bf16"
    assert cell(drop=["ddp powersgd 1", "ddp bf16", "ddp fp16", "deepspeed fp32"]).fastest() is None


@pytest.mark.parametrize(
    ("rate", "plain", "casts"), [("100mbit", False, False), ("200mbit", True, True), ("1gbit", True, True), ("none", None, None)]
)
def test_the_bars_of_30m_parameters_on_two_hosts(rate, plain, casts):
    """Planned is 4.76 times as fast as plain and 2.29 times as the better hook: asked are 8 and 3.5, 4.5 and 2, 2 and 1.05."""
    one = cell(rate=rate)
    for bar, met in (("plain", plain), ("casts", casts)):
        checks = found([one], bar)
        assert (checks[one.name].met if met is not None else checks) == (met if met is not None else {})
    assert not found([cell(model="gpt2-5m", rate=rate)], "plain")
    assert not found([cell(nodes=4, rate=rate)], "casts")


@pytest.mark.parametrize(
    ("rate", "peer_s", "met"), [("1gbit", 0.97, True), ("1gbit", 0.96, False), ("none", 0.97, False), ("none", 0.98, True)]
)
def test_never_much_slower_than_the_fastest_peer(rate, peer_s, met):
    one = cell(rate=rate, **{"ddp powersgd 1": variant("peer", peer_s), "espresso": variant("ours", 1.0)})
    assert found([one], "fastest")[one.name].met is met


def test_the_loss_is_compared_with_the_fastest_peer_by_means_over_seeds():
    """Means 2.5 and 2.6."""
    one = cell()
    assert found([one], "loss")[one.name].met is True
    assert found([one], "loss")[one.name].figure == "2.500, 2.600"
    assert not found([cell(rate="none")], "loss")

    def losses(ours, theirs):
        return {"espresso": {"steps": 60, "final": ours}, "ddp powersgd 1": {"steps": 60, "final": theirs}}

    equal = cell(losses=losses([2.6], [2.6]))
    assert found([equal], "loss")[equal.name].met is False
    diverged = cell(losses=losses([2.6], [2.0, math.nan]))
    assert found([diverged], "loss")[diverged.name].met is True
    assert diverged.losses["ddp powersgd 1"].final == [2.0, None]
    ours_diverged = cell(losses=losses([math.inf], [math.nan]))
    assert found([ours_diverged], "loss")[ours_diverged.name].met is False
    missing = cell(losses={})
    assert found([missing], "loss")[missing.name].met is None
    unequal = losses([2.0], [2.0])
    unequal["espresso"]["steps"] = 50
    with pytest.raises(ValueError, match="50 and 60 steps"):
        bars.checks([cell(losses=unequal)])


def test_median_and_worst_over_the_shaped_cells():
    """Steps 5%, 9%, 19% and, unshaped, 50% above compute only: median 9% and worst 19% count three cells."""
    rates = {"100mbit": 1.05, "200mbit": 1.09, "1gbit": 1.19, "none": 1.5}
    cells = [cell(rate=rate, espresso=variant("ours", step, predicted_s=step)) for rate, step in rates.items()]
    total = found(cells, "bound")[""]
    assert (total.figure, total.met) == ("median 9.0%, worst 19.0% of 3 shaped cells", True)
    slower = [*cells, cell(nodes=4, espresso=variant("ours", 1.21))]
    assert found(slower, "bound")[""].met is False
    assert found(slower, "bound")["gpt2-30m 4x1 200 Mbit/s"].met is False
    assert found(cells[1:], "bound")[""].met is False, "the median of 9% and 19% is 14%"


def test_predictions_may_be_off_both_ways():
    """-8%, +10% and -19%: median 10%, worst 19%; an unshaped cell counts."""
    offs = {"100mbit": 0.92, "200mbit": 1.1, "none": 0.81}
    cells = [cell(rate=rate, espresso=variant("ours", 1.0, predicted_s=off)) for rate, off in offs.items()]
    total = found(cells, "predicted")[""]
    assert total.figure == "median 10.0%, worst 19.0% of 3 cells"
    worse = [*cells, cell(rate="1gbit", espresso=variant("ours", 1.0, predicted_s=0.79))]
    assert found(worse, "predicted")[""].met is False
    assert found(worse, "predicted")["gpt2-30m 2x1 1 Gbit/s"].met is False
    assert found([cell(espresso=variant("ours", 1.0))], "predicted")[""].met is None


def test_a_plan_from_a_run_has_a_bar_of_its_own():
    """Promised 0.9 s, took 1.0; planned again from that run 0.97 s for 0.95: 10% and 2% off."""
    again = variant("ours", 0.95, predicted_s=0.97)
    one = cell(espresso=variant("ours", 1.0, predicted_s=0.9), **{"espresso replanned": again})
    assert found([one], "predicted")[""].figure == "median 10.0%, worst 10.0% of 1 cells"
    assert found([one, cell()], "replanned")[""].figure == "median 2.1%, worst 2.1% of 1 cells"
    assert "| 0.950 | +2% | 91" in report.markdown([one]).splitlines()[2]


def test_what_did_not_run_is_not_met():
    one = cell(drop=["espresso"], losses={})
    assert {check.met for check in bars.checks([one])} == {None}
    grid = shown([report.tables([one])[1]])
    assert grid.count("not measured") == 6 and not re.search(r"\d (met|MISSED)", grid)


def test_tables_say_the_figures_worked_out_by_hand():
    text = shown(report.tables([cell()]))
    rows = {row.split("  ")[1].strip(): row.split() for row in text.splitlines() if row.startswith("  ")}
    assert rows["espresso"][1:] == "1.050 1.025 to 1.075 3 4.76x 1.05x 0.95x 0.040 0.010 - 3.5 2.500".split()
    assert rows["ddp powersgd 1 *"][4:] == "1.200 1.200 to 1.300 3 4.17x 1.20x - - - - - 2.600".split()
    assert rows["compute only"][2:] == "1.000 0.950 to 1.150 3 5.00x 1.00x - - - - 0 -".split()
    assert re.search(r"4\.76x met +2\.29x met +1\.14x met +2\.500, 2\.600 met +\+5\.0% met +-4\.8% met", text)


def test_markdown_has_a_line_for_each_cell_and_names_what_missed():
    text = report.markdown([cell(rate="none"), cell(rate="100mbit")])
    lines = text.splitlines()
    assert lines[2].startswith(
        "| gpt2-30m | 2x1 | 100 Mbit/s | 5.000 | 2.400 (ddp bf16) | 1.200 (ddp powersgd 1) | **1.050** | 1.000 |"
    )
    assert lines[2].endswith("| **4.76x** | 1.14x | +5% | -5% | - | - | 91, 3.5 | 2.500, 2.600 |")
    assert lines[3].startswith("| gpt2-30m | 2x1 | unshaped |")
    assert "| plain DeepSpeed / this | 8x | 0 of 1 | gpt2-30m 2x1 100 Mbit/s (4.76x) |" in lines
    assert {line.count("|") for line in lines[:4]} == {17}


def test_a_step_is_split_without_remainder():
    one = cell(ddp=variant("peer", 4.0), **{"deepspeed bf16": variant("peer", 0.8)})
    assert pictures.split(one, OURS) == pytest.approx((1.0, 0.04, 0.01, 0.0))
    assert pictures.split(one, "ddp") == pytest.approx((1.0, 3.0, 0.0, 0.0))
    assert pictures.split(one, "deepspeed fp32") == pytest.approx((1.0, 4.0, 0.0, 0.0))
    assert pictures.split(one, "ddp powersgd 1") == pytest.approx((1.0, 0.0, 0.0, 0.2))
    assert pictures.split(one, "deepspeed bf16") == pytest.approx((0.8, 0.0, 0.0, 0.0)), "faster than compute only, by noise"
    assert pictures.split(one, BOUND) == pytest.approx((1.0, 0.0, 0.0, 0.0))
    for name, each in one.variants.items():
        assert sum(pictures.split(one, name)) == pytest.approx(each.median_s)


def test_pictures_are_small_files(tmp_path):
    cells = [cell(rate=rate, nodes=nodes) for rate in ("100mbit", "none") for nodes in (2, 4)]
    drawn = report.pictures([*cells, cell(model="vgg")], tmp_path)
    assert sorted(path.name for path in drawn) == ["race-gpt2-30m.png", "race-predicted.png", "race-vgg.png"]
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 200_000
    no_plan = cell(drop=["espresso", "espresso all"])
    assert [path.name for path in report.pictures([no_plan], tmp_path)] == ["race-gpt2-30m.png"]


def test_files_round_trip_in_order_and_the_command_reads_them(tmp_path, capsys):
    cells = [cell(model=model, rate=rate) for model in ("vgg", "gpt2-30m", "gpt2-5m") for rate in ("none", "1gbit", "200mbit")]
    for one in cells:
        one.save(tmp_path / f"{one.model}-{one.cluster}-{one.rate}.json")
    read = load_cells(tmp_path)
    assert read == in_order(cells)
    assert [one.name for one in read[:4]] == [
        "gpt2-5m 2x1 200 Mbit/s",
        "gpt2-5m 2x1 1 Gbit/s",
        "gpt2-5m 2x1 unshaped",
        "gpt2-30m 2x1 200 Mbit/s",
    ]
    report.main(["--markdown", "--models", "gpt2-30m"], tmp_path)
    said = capsys.readouterr().out
    assert said.count("| gpt2-30m | 2x1") == 3 and "| vgg |" not in said
    with pytest.raises(SystemExit):
        report.main(["--models", "gpt3"], tmp_path)
    with pytest.raises(FileError, match="no race results"):
        load_cells(tmp_path / "none")


def test_losses_of_one_diverged_seed_are_infinite():
    assert Losses(steps=60, final=[1.0, None]).mean == math.inf
    assert bars.loss(math.inf) == "diverged"
