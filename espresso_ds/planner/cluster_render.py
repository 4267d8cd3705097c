"""A cluster profile as a picture: what was measured, and the alpha-beta lines fitted through it, on logarithmic axes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..core.errors import FileError
from ..core.option import Level, Task
from ..core.people import people_bit_per_s, people_seconds
from ..core.profile import ClusterProfile, RoutineCost
from .pictures import check_picture

_COLOURS = {
    Task.ALLREDUCE: "#c0392b",
    Task.ALLGATHER: "#2e8b57",
    Task.REDUCE_SCATTER: "#e08a1e",
    Task.REDUCE: "#4a6fa5",
    Task.BROADCAST: "#8e5ea2",
    Task.ALLTOALL: "#3b3b3b",
    Task.GATHER: "#17a2a2",
}
_OF_MPI = {"allreduce": Task.ALLREDUCE, "allgather": Task.ALLGATHER, "alltoall": Task.ALLTOALL}
_LINK_COLOUR = "#6b7b8c"


class Series(NamedTuple):
    """One row of points. `line` is (alpha_s, beta_s_per_byte); None for MPI, whose points are joined instead."""

    label: str
    colour: str
    nbytes: Sequence[int]
    seconds: Sequence[float]
    spread: Sequence[float]
    line: tuple[float, float] | None


def panels(profile: ClusterProfile) -> dict[str, list[Series]]:
    """What the picture holds, by panel: links, then the routines of each level and number of groups at once."""
    found: dict[str, list[Series]] = {}
    for level, link in profile.links.items():
        if link.nbytes:
            label = f"{level}: {_line_text(link.alpha_s, link.beta_s_per_byte)}"
            colour = _LINK_COLOUR if level is Level.INTER else "#c9a227"
            line = (link.alpha_s, link.beta_s_per_byte)
            found.setdefault("links", []).append(Series(label, colour, link.nbytes, link.seconds, link.spread, line))
    for cost in profile.routines:
        label = f"{cost.routine.name.lower()}: {_line_text(cost.alpha_s, cost.beta_s_per_byte)}"
        line = (cost.alpha_s, cost.beta_s_per_byte)
        series = Series(label, _COLOURS[cost.routine], cost.nbytes, cost.seconds, cost.spread, line)
        found.setdefault(_panel(cost), []).append(series)
    flat = next((_panel(cost) for cost in profile.routines if cost.level is Level.FLAT), None)
    for raw in profile.mpi.costs if profile.mpi is not None else ():
        panel, colour = (flat, _COLOURS[_OF_MPI[raw.operation]]) if raw.operation in _OF_MPI else ("links", _LINK_COLOUR)
        if panel in found:
            found[panel].append(Series(f"MPI {raw.operation}", colour, raw.nbytes, raw.seconds, raw.spread, None))
    return found


def draw_fit(profile: ClusterProfile, path: str | Path) -> None:
    """Write the picture; the suffix of `path` says the format.

    Raises:
        FileError: see `check_picture`; or the profile holds no measurement.
    """
    check_picture(path)
    found = panels(profile)
    if not found:
        raise FileError(f"{path}: the cluster profile holds nothing to draw; measure with `{ClusterProfile.MADE_BY}`")
    with matplotlib.rc_context({"font.size": 9, "svg.fonttype": "none"}):
        columns = min(2, len(found))
        rows = -(-len(found) // columns)
        figure = Figure(figsize=(6.2 * columns, 5.4 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (title, series) in zip(grid, found.items(), strict=False):
            _draw_panel(axes, title, series)
        for axes in grid[len(found) :]:
            axes.set_visible(False)
        figure.suptitle(
            f"{profile.nodes} hosts x {profile.ranks_per_node} ranks over {profile.backend}: medians with their spread, "
            "lines alpha + bytes / bandwidth",
            x=0.01,
            ha="left",
        )
        figure.savefig(path, dpi=130)


def _draw_panel(axes: Axes, title: str, every: Sequence[Series]) -> None:
    for series in every:
        nbytes, seconds = np.array(series.nbytes, float), np.array(series.seconds)
        if series.line is None:
            axes.plot(nbytes, seconds, ":x", color=series.colour, linewidth=1, markersize=4, label=series.label)
            continue
        half = seconds * np.array(series.spread or [0.0] * len(seconds)) / 2
        half = np.minimum(half, 0.9 * seconds)  # a bar to zero and below has no end on a logarithmic axis
        axes.errorbar(nbytes, seconds, half, fmt="o", color=series.colour, markersize=3.5, elinewidth=0.8)
        dense = np.geomspace(nbytes.min(), nbytes.max(), 100)
        alpha_s, beta = series.line
        axes.plot(dense, alpha_s + beta * dense, color=series.colour, linewidth=1, label=series.label)
    axes.set(xscale="log", yscale="log", xlabel="bytes that one rank puts in", ylabel="seconds")
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(alpha=0.25, linewidth=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(fontsize=7.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def _panel(cost: RoutineCost) -> str:
    at_once = f", {cost.groups} groups at once" if cost.groups > 1 else ""
    return f"routines, {cost.level}: {cost.ranks} ranks{at_once}"


def _line_text(alpha_s: float, beta: float) -> str:
    return f"{people_seconds(alpha_s)} + {people_bit_per_s(8 / beta)}" if beta else people_seconds(alpha_s)
