"""What the quickstart measured, as one table: plain DeepSpeed beside the planned run, and the plan's promises beside both."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.table import Table

from espresso_ds.core.plan import Prediction, load_plan_file
from espresso_ds.core.record import load_json

WARM_UP = 3
"""First steps of a run that are not timed: allocators, page cache and connections are still cold."""
LAST = 10
"""The loss reported is the mean over this many last steps."""
MADE_BY = "bash launch/quickstart.sh"


@dataclass(frozen=True)
class Run:
    """One training run, times in seconds."""

    seed: int
    step_s: float
    loss: float
    accuracy: float
    bytes_per_step: float
    """Sent by one host in one optimizer step, headers and resent packets included."""
    bytes_total: int | None
    """Sent by one host from start to end, the first broadcast of the weights included; None for local ranks."""


@dataclass(frozen=True)
class Comparison:
    """Plain and planned runs with equal seeds, and what the plan had promised."""

    rate: str
    plain: list[Run]
    planned: list[Run]
    predicted: Prediction

    def mean(self, kind: str, field: str) -> float:
        """Mean of a field over the seeds of `kind`, "plain" or "planned"."""
        return fmean(getattr(run, field) for run in getattr(self, kind))

    @property
    def speed_up(self) -> float:
        """Steps per second, planned over plain."""
        return self.mean("plain", "step_s") / self.mean("planned", "step_s")

    def as_json(self) -> dict[str, Any]:
        """All figures, for report.json."""
        runs = {"plain": [asdict(run) for run in self.plain], "planned": [asdict(run) for run in self.planned]}
        return {"rate": self.rate, "speed_up": self.speed_up, **runs, "predicted": self.predicted.model_dump(mode="json")}


def read_run(log: Path, crossed: Path | None) -> Run:
    """Read what examples/sentiment.py wrote, and the bytes that launch/emulate counted (None: local ranks, loopback).

    Raises:
        FileError: a file is missing or torn.
    """
    result = load_json(log, "training log", MADE_BY)
    steps, sent = len(result["step_s"]), result["bytes_sent"]
    if crossed is None:
        per_step, total = sent["lo"] / steps / result["world_size"], None
    else:
        per_step = sum(count for nic, count in sent.items() if nic != "lo") / steps
        hosts = load_json(crossed, "byte count", MADE_BY)["hosts"]
        total = max(host["tx_bytes"] for host in hosts)
    loss = fmean(result["loss"][-LAST:])
    return Run(result["seed"], median(result["step_s"][WARM_UP:]), loss, result["accuracy"], per_step, total)


def compare(plain: list[Run], planned: list[Run], plan: Path, rate: str) -> Comparison:
    """Put the runs beside the prediction in `plan`. Raises FileError if the plan cannot be read."""
    return Comparison(rate, plain, planned, load_plan_file(plan)[2].predicted)


def table(comparison: Comparison) -> Table:
    """The comparison for people; means over seeds."""
    mean, predicted = comparison.mean, comparison.predicted
    seeds = len(comparison.plain)
    shown = Table(title=f"{len(comparison.plain)} seed{'s' * (seeds > 1)}, links: {comparison.rate}", title_justify="left")
    for column, justify in (("", "left"), ("plain DeepSpeed", "right"), ("planned", "right"), ("planned / plain", "right")):
        shown.add_column(column, justify=justify)

    def row(name: str, field: str, form: str, scale: float = 1.0) -> None:
        plain, planned = mean("plain", field), mean("planned", field)
        shown.add_row(name, form.format(plain / scale), form.format(planned / scale), f"{planned / plain:.3g}")

    row("step time, median", "step_s", "{:.3f} s")
    shown.add_row(
        "  predicted",
        f"{predicted.stock_s:.3f} s",
        f"{predicted.planned_s:.3f} s",
        f"{predicted.planned_s / predicted.stock_s:.3g}",
    )
    shown.add_row(
        "  measured / predicted",
        f"{mean('plain', 'step_s') / predicted.stock_s:.2f}",
        f"{mean('planned', 'step_s') / predicted.planned_s:.2f}",
        "",
    )
    bound = predicted.compute_s
    shown.add_row(
        f"  over compute alone ({bound:.3f} s)",
        f"{mean('plain', 'step_s') / bound:.2f}",
        f"{mean('planned', 'step_s') / bound:.2f}",
        "",
    )
    row("sent by a host per step", "bytes_per_step", "{:.2f} MB", 1e6)
    if comparison.plain[0].bytes_total is not None:
        row("sent by a host in all", "bytes_total", "{:.0f} MB", 1e6)
    row(f"training loss, last {LAST} steps", "loss", "{:.3f}")
    points = 100 * (mean("planned", "accuracy") - mean("plain", "accuracy"))
    shown.add_row(
        "accuracy on held-out text",
        f"{mean('plain', 'accuracy'):.1%}",
        f"{mean('planned', 'accuracy'):.1%}",
        f"{points:+.1f} points",
    )
    shown.add_section()
    shown.add_row("[bold]steps per second, planned over plain[/]", "", f"[bold]{comparison.speed_up:.2f}x[/]", "")
    return shown
