"""What-if curves for people: a table with the answers for the terminal, a picture of step times and speed-ups."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..core.people import people_bit_per_s
from ..core.plan import Prediction
from .pictures import check_picture
from .what_if import Point, WhatIf

_LINES = (  # field of Prediction, label, colour, line style
    ("stock_s", "DeepSpeed as it is", "#7f96ad", "-"),
    ("uncompressed_s", "overlap alone", "#c0392b", "-"),
    ("planned_s", "planned", "#2e8b57", "-"),
    ("lower_bound_s", "no strategy is faster", "#2e8b57", ":"),
    ("compute_s", "compute only", "black", "--"),
)


def table(found: WhatIf) -> RenderableType:
    """The curve, a point per row, and the answers below."""
    measured = f"{found.nodes} nodes x {found.ranks_per_node} ranks, {found.backend}"
    shown = Table(box=box.SIMPLE_HEAD, title=f"Predicted step of {found.model}; rescaled from {measured}", title_justify="left")
    places = ("between nodes", "x measured") if found.axis == "bandwidth" else ("nodes", "ranks")
    for column in (*places, "DeepSpeed", "overlap", "planned", "bound", "compute", "speed-up", "of compute speed"):
        shown.add_column(column, justify="right")
    for point in found.points:
        p = point.predicted
        here = point.inter_speed == 1 if found.axis == "bandwidth" else point.nodes == found.nodes
        shown.add_row(
            *_place(found, point),
            *(_seconds(s) for s in (p.stock_s, p.uncompressed_s, p.planned_s, p.lower_bound_s, p.compute_s)),
            f"{p.stock_s / p.planned_s:.2f}x",
            f"{p.compute_s / p.planned_s:.0%}",
            style="bold" if here else None,
        )
    return Group(shown, *(Text(answer.words) for answer in found.answers))


def draw(found: WhatIf, path: str | Path) -> None:
    """Write a picture: step times above, speed-ups over DeepSpeed below; the suffix of `path` says the format.

    Raises FileError as `check_picture` does.
    """
    check_picture(path)
    rates = [point.inter_bit_per_s for point in found.points if point.inter_bit_per_s is not None]
    absolute = found.axis == "bandwidth" and len(rates) == len(found.points)
    if found.axis == "nodes":
        xs, label = [float(point.nodes) for point in found.points], f"nodes of {found.ranks_per_node} ranks"
    elif absolute:
        xs, label = rates, "bandwidth between nodes"
    else:
        xs, label = [point.inter_speed for point in found.points], "bandwidth between nodes over the measured one"
    predictions = [point.predicted for point in found.points]
    with matplotlib.rc_context({"font.size": 10, "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 7), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        for field, name, colour, style in _LINES:
            above.plot(xs, [getattr(p, field) for p in predictions], color=colour, linestyle=style, label=name)
        above.set_yscale("log")
        above.set_ylabel("step")
        above.yaxis.set_major_formatter(FuncFormatter(lambda s, _: _seconds(s)))
        above.yaxis.set_minor_formatter(FuncFormatter(lambda s, _: ""))
        above.legend(frameon=False)
        for field, name, colour, _ in _LINES[1:3]:
            below.plot(xs, _speed_ups(predictions, field), color=colour, label=name)
        below.set_ylabel("speed-up over DeepSpeed")
        below.set_ylim(bottom=0)
        below.set_xscale("log", base=10 if found.axis == "bandwidth" else 2)
        below.xaxis.set_major_formatter(FuncFormatter(lambda x, _: people_bit_per_s(x) if absolute else f"{x:g}"))
        below.set_xlabel(label)
        for axes in (above, below):
            axes.grid(visible=True, color="#e3e7eb")
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"{found.model}: predicted from {found.nodes} nodes x {found.ranks_per_node} ranks over {found.backend}")
        figure.savefig(path, dpi=150)


def _speed_ups(predictions: list[Prediction], field: str) -> list[float]:
    return [p.stock_s / getattr(p, field) for p in predictions]


def _place(found: WhatIf, point: Point) -> tuple[str, str]:
    if found.axis == "nodes":
        return str(point.nodes), str(point.ranks)
    return people_bit_per_s(point.inter_bit_per_s) if point.inter_bit_per_s else "not measured", f"{point.inter_speed:.3g}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
