"""Pictures of a race: where a step's time goes, and measured steps against predicted ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator

from .bars import MEDIAN_OFF, WORST_OFF
from .results import BOUND, CAST_HOOKS, OURS, PLAIN, CellResult

MAIN = (PLAIN, "ddp", *CAST_HOOKS, "ddp powersgd 1", "ddp batched powersgd 1", OURS, BOUND)
"""Variants in pictures, top to bottom; the fastest peer joins them where it is another."""
UNTOLD = (*CAST_HOOKS, "powersgd", "bf16", "fp16")
"""What compresses, in words of a peer's name: what such a peer exposes cannot be told apart from outside."""
COLOURS = {"compute": "#7f96ad", "communication": "#c0392b", "compression": "#e0a030", "either": "#c98b7f"}
LABELS = {
    "compute": "compute",
    "communication": "exposed communication",
    "compression": "exposed compression",
    "either": "exposed communication or compression (not told apart in peers)",
}
_KINDS = {"ours": ("#2e8b57", "planned"), "crippled": ("#b0b8c0", "from a search that lacks something")}


class Split(NamedTuple):
    """Seconds of a median step by where they go; they add up to it."""

    compute: float
    communication: float
    compression: float
    either: float


def split(cell: CellResult, name: str) -> Split:
    """Where the median step of a variant goes.

    A plan's spans tell it. Of a peer what lies above compute only is communication, or, where it compresses, either.
    """
    variant = cell.variants[name]
    step, link, codec = variant.median_s, variant.exposed_communication_s, variant.exposed_compression_s
    if link is not None and codec is not None:
        exposed = min(1.0, step / max(link + codec, 1e-12))
        return Split(step - (link + codec) * exposed, link * exposed, codec * exposed, 0.0)
    bound = cell.step_s(BOUND)
    if bound is None or variant.kind == "bound":
        return Split(step, 0.0, 0.0, 0.0)
    compute = min(step, bound)
    compresses = variant.kind != "peer" or any(word in name for word in UNTOLD)
    return Split(compute, 0.0, 0.0, step - compute) if compresses else Split(compute, step - compute, 0.0, 0.0)


def steps(cells: Sequence[CellResult], path: Path) -> Path:
    """Bars of one model's cells: clusters down, rates across. `path` ends in .png."""
    clusters, links = (list(dict.fromkeys(getattr(cell, key) for cell in cells)) for key in ("cluster", "link"))
    with matplotlib.rc_context({"font.size": 8}):
        figure = Figure(figsize=(3.2 * len(links) + 1.4, 2.1 * len(clusters) + 0.9), layout="constrained")
        grid = figure.subplots(len(clusters), len(links), squeeze=False)
        for axes in grid.flat:
            axes.set_visible(False)
        for cell in cells:
            _bars(grid[clusters.index(cell.cluster), links.index(cell.link)], cell)
        seen = {key for cell in cells for name in _main(cell) for key, seconds in split(cell, name)._asdict().items() if seconds}
        patches = [Patch(color=COLOURS[key], label=LABELS[key]) for key in COLOURS if key in seen]
        figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
        figure.suptitle(f"{cells[0].model}: median step, seconds (whiskers: middle half)")
        _save(figure, path)
    return path


def predictions(cells: Sequence[CellResult], path: Path) -> list[Path]:
    """Measured against predicted steps of all plans; nothing is drawn where none was predicted."""
    points = {
        kind: [
            (variant.predicted_s, variant.median_s)
            for cell in cells
            for variant in cell.variants.values()
            if variant.kind == kind and variant.predicted_s is not None
        ]
        for kind in reversed(_KINDS)
    }
    ends = [seconds for pairs in points.values() for pair in pairs for seconds in pair]
    if not ends:
        return []
    low, high = min(ends) * 0.8, max(ends) * 1.25
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(5.5, 5), layout="constrained")
        axes = figure.subplots()
        for off, shade in ((WORST_OFF, "#f1f3f5"), (MEDIAN_OFF, "#e0e5ea")):
            edges = [[end * (1 + sign * off) for end in (low, high)] for sign in (-1, 1)]
            axes.fill_betweenx([low, high], *edges, color=shade, label=f"within {off:.0%} of measured", zorder=0)
        for kind, pairs in points.items():
            colour, label = _KINDS[kind]
            if pairs:
                axes.scatter(*zip(*pairs, strict=True), s=16, color=colour, label=label, zorder=2)
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
        axes.set(xlabel="predicted step, s", ylabel="measured step, s")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g}"))
            axis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        axes.legend(frameon=False, loc="upper left")
        axes.spines[["top", "right"]].set_visible(False)
        _save(figure, path)
    return [path]


def _main(cell: CellResult) -> list[str]:
    fastest = cell.fastest()
    wanted = MAIN if fastest is None or fastest in MAIN else (*MAIN[:-2], fastest, *MAIN[-2:])
    return [name for name in wanted if name in cell.variants]


def _bars(axes: Axes, cell: CellResult) -> None:
    axes.set_visible(True)
    names, fastest = _main(cell), cell.fastest()
    places = range(len(names))
    left = [0.0] * len(names)
    for key, colour in COLOURS.items():
        widths = [getattr(split(cell, name), key) for name in names]
        axes.barh(places, widths, left=left, color=colour, height=0.7)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, name in zip(places, names, strict=True):
        first, third = cell.variants[name].quartiles_s
        axes.plot([first, third], [place, place], color="black", linewidth=0.8)
        axes.text(max(third, left[place]), place, f" {left[place]:.2f}", va="center")
    axes.set_yticks(places, [f"{name} *" if name == fastest else name for name in names])
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if name == OURS else "normal")
    axes.invert_yaxis()
    axes.set_xlim(0, max(*left, *(cell.variants[name].quartiles_s[1] for name in names)) * 1.2)
    axes.set_title(f"{cell.cluster}, {cell.link}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110, metadata={"Software": None}, pil_kwargs={"optimize": True})
