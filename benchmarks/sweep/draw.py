"""Pictures of the sweep: efficiency over GPUs, over links, of the large transformer, and predicted against measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from . import traces
from .large import GROUPS

STYLE = {
    "DeepSpeed": ("#7f96ad", "-"),
    "overlap": ("#c0392b", "-"),
    "BytePS-Compress": ("#b58900", "--"),
    "HiTopKComm": ("#8e5ea2", "--"),
    "HiPress": ("#3a7ca5", "--"),
    "planned": ("#2e8b57", "-"),
    "upper bound": ("black", ":"),
}
SPEEDS = {10.0: "#c0392b", 25.0: "#e08e3a", 100.0: "#3a7ca5", 400.0: "#2e8b57"}
ROUTINES = {
    "AR": "#c0392b",
    "RS": "#e08e3a",
    "AG": "#b58900",
    "A2A": "#2e8b57",
    "RD": "#3a7ca5",
    "BC": "#8e5ea2",
    "GA": "#7f96ad",
}


def pictures(results: dict[str, Any], folder: Path) -> Iterator[Path]:
    """Draw those whose figures are there."""
    drawn = {"scaling": ("traces", _scaling), "links": ("traces", _links), "70b": ("large", _large), "check": ("check", _check)}
    for name, (part, draw) in drawn.items():
        if part in results:
            path = folder / f"sweep-{name}.png"
            with matplotlib.rc_context({"font.size": 9}):
                draw(results[part]).savefig(path, dpi=110)
            yield path


def _scaling(result: dict[str, Any]) -> Figure:
    owned = list(traces.of(result, own=True))
    figure, grid = _grid(owned, "Scaling efficiency on the testbeds' own links")
    for found, axes in zip(owned, grid, strict=True):
        xs = [point["ranks"] for point in found["points"]]
        for way, (colour, style) in STYLE.items():
            ys = [traces.efficiency(point, way) for point in found["points"]]
            axes.plot(xs, ys, color=colour, linestyle=style, label=way)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLE), frameon=False)
    return figure


def _links(result: dict[str, Any]) -> Figure:
    owned = list(traces.of(result, own=True))
    figure, grid = _grid(owned, "Scaling efficiency over links between nodes: planned, and dashed overlap alone")
    for chosen, axes in zip(owned, grid, strict=True):
        for rate, colour in SPEEDS.items():
            named = {"testbed": chosen["testbed"], "model": chosen["model"], "link": f"{rate:g} Gbit/s"}
            for found in traces.of(result, **named):
                _both(axes, found, 1, colour, f"{rate:g} Gbit/s")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(SPEEDS), frameon=False)
    return figure


def _large(result: dict[str, Any]) -> Figure:
    codecs = list(dict.fromkeys(found["codec"] for found in result["curves"]))
    figure = Figure(figsize=(9, 4), layout="constrained")
    grid = figure.subplots(1, len(codecs), sharey=True)
    for codec, axes in zip(codecs, grid, strict=True):
        for found in result["curves"]:
            if found["codec"] == codec:
                _both(axes, found, GROUPS, SPEEDS[found["gbit_per_s"]], f"{found['gbit_per_s']:g} Gbit/s a node")
        _over_gpus(axes, f"{found['model']} + {codec}")
    grid[0].set_ylabel("scaling efficiency")
    figure.suptitle("Tensor parallel 8 inside nodes, data parallel between them: planned, and dashed overlap alone")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(SPEEDS), frameon=False)
    return figure


def _check(result: dict[str, Any]) -> Figure:
    rows = result["rows"]
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    for row, axes in zip(rows, figure.subplots(1, len(rows), sharex=True, sharey=True), strict=True):
        for routine, colour in ROUTINES.items():
            for bandwidth, marker in ((True, "o"), (False, "x")):
                mine = [r for r in row["ratios"] if r["routine"] == routine and r["bandwidth"] is bandwidth]
                xs, ys = [r["measured_s"] * 1e3 for r in mine], [r["predicted_s"] * 1e3 for r in mine]
                axes.scatter(xs, ys, s=12, color=colour, marker=marker, label=routine if bandwidth else None)
        axes.axline((1, 1), (10, 10), color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="measured, ms")
        axes.set_title(f"{row['from']}\nto {row['to']}", fontsize=9)
        _plain(axes)
    figure.axes[0].set_ylabel("predicted, ms")
    figure.suptitle(f"Routines at {result['rate']}, predicted from smaller clusters (o bandwidth, x latency takes longer)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ROUTINES), frameon=False)
    return figure


def _both(axes: Axes, found: dict[str, Any], gpus: int, colour: str, label: str) -> None:
    xs = [point["ranks"] * gpus for point in found["points"]]
    for way, style in (("planned", "-"), ("overlap", "--")):
        ys = [traces.efficiency(point, way) for point in found["points"]]
        axes.plot(xs, ys, color=colour, linestyle=style, label=label if way == "planned" else None)


def _grid(owned: list[dict[str, Any]], title: str) -> tuple[Figure, list[Axes]]:
    """Axes for these curves, a row for each testbed."""
    testbeds = list(dict.fromkeys(found["testbed"] for found in owned))
    figure = Figure(figsize=(13, 6), layout="constrained")
    grid = figure.subplots(len(testbeds), len(owned) // len(testbeds), sharex=True, sharey=True, squeeze=False)
    figure.suptitle(title)
    flat = [axes for row in grid for axes in row]
    for found, axes in zip(owned, flat, strict=True):
        _over_gpus(axes, f"{found['model']} + {found['codec']}, {found['testbed']}")
    for axes in flat:
        axes.set_ylabel("scaling efficiency")
        axes.label_outer()
    return figure, flat


def _over_gpus(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set_xticks([8, 32, 128, 512])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("GPUs")
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}"))
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.grid(visible=True, color="#e3e7eb")
    axes.spines[["top", "right"]].set_visible(False)
