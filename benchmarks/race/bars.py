"""What a race has to reach, and whether it did: ratios of median steps, never of best ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from .results import BOUND, CAST_HOOKS, OURS, PLAIN, REPLANNED, CellResult

AGAINST_PLAIN: Mapping[str, float] = MappingProxyType({"100mbit": 8.0, "200mbit": 4.5, "1gbit": 2.0})
AGAINST_CASTS: Mapping[str, float] = MappingProxyType({"100mbit": 3.5, "200mbit": 2.0, "1gbit": 1.05})
RATIOS_OF = ("gpt2-30m", "2x1")
"""Model and cluster of the two bars above."""
AGAINST_FASTEST_SHAPED, AGAINST_FASTEST_UNSHAPED = 0.97, 0.98
MEDIAN_OFF, WORST_OFF = 0.10, 0.20
"""How far a step may lie above compute only, and a prediction beside the measured step."""

TITLES: Mapping[str, str] = MappingProxyType(
    {
        "plain": "plain DeepSpeed / this",
        "casts": "better cast hook / this",
        "fastest": "fastest peer / this",
        "loss": "loss below that peer's",
        "bound": "above compute only",
        "predicted": "predicted / measured",
        "replanned": "replanned from a run: predicted / measured",
    }
)


class Check(NamedTuple):
    """One bar in one cell, or over all (`cell` is empty).

    Attributes:
        bar: key of TITLES.
        cell: the cell's name.
        figure: what was found, for people.
        asked: what was to be reached.
        met: None where a variant that it needs did not run.
    """

    bar: str
    cell: str
    figure: str
    asked: str
    met: bool | None


def speed_up(cell: CellResult, name: str | None, over: str = OURS) -> float | None:
    """How many times as fast as the variant `name` the variant `over` is; None where one did not run."""
    theirs, ours = cell.step_s(name) if name else None, cell.step_s(over)
    return None if theirs is None or ours is None else theirs / ours


def above_bound(cell: CellResult, name: str = OURS) -> float | None:
    """Share by which a step is longer than compute only: 0.1 is 10%."""
    ratio = speed_up(cell, name, over=BOUND)
    return None if ratio is None else ratio - 1


def off_prediction(cell: CellResult, name: str = OURS) -> float | None:
    """Predicted over measured step, less 1: negative where the plan promised too short a step."""
    found = cell.variants.get(name)
    return None if found is None or found.predicted_s is None else found.predicted_s / found.median_s - 1


def checks(cells: Sequence[CellResult]) -> list[Check]:
    """Every bar in every cell that it is about, then the medians over cells."""
    found = [check for cell in cells for check in _of_cell(cell)]
    over = [above_bound(cell) for cell in cells if cell.shaped]
    off = [off_prediction(cell) for cell in cells]
    off_again = [off_prediction(cell, REPLANNED) for cell in cells]
    return [
        *found,
        _median_and_worst("bound", over, "shaped cells"),
        _median_and_worst("predicted", off, "cells"),
        _median_and_worst("replanned", off_again, "cells"),
    ]


def _of_cell(cell: CellResult) -> Iterable[Check]:
    if (cell.model, cell.cluster) == RATIOS_OF and cell.rate in AGAINST_PLAIN:
        yield _at_least("plain", cell, speed_up(cell, PLAIN), AGAINST_PLAIN[cell.rate])
        yield _at_least("casts", cell, speed_up(cell, cell.fastest(CAST_HOOKS)), AGAINST_CASTS[cell.rate])
    peer = cell.fastest()
    least = AGAINST_FASTEST_SHAPED if cell.shaped else AGAINST_FASTEST_UNSHAPED
    yield _at_least("fastest", cell, speed_up(cell, peer), least)
    if cell.shaped:
        yield _loss(cell, peer)
        yield _at_most("bound", cell, above_bound(cell))
    yield _at_most("predicted", cell, off_prediction(cell))
    if REPLANNED in cell.variants:
        yield _at_most("replanned", cell, off_prediction(cell, REPLANNED))


def _at_least(bar: str, cell: CellResult, ratio: float | None, least: float) -> Check:
    return Check(bar, cell.name, _or_dash(ratio, "{:.2f}x"), f"{least:g}x", None if ratio is None else ratio >= least)


def _at_most(bar: str, cell: CellResult, share: float | None) -> Check:
    met = None if share is None else (share if bar == "bound" else abs(share)) <= WORST_OFF
    return Check(bar, cell.name, _or_dash(share, "{:+.1%}"), f"within {WORST_OFF:.0%}", met)


def _loss(cell: CellResult, peer: str | None) -> Check:
    ours, theirs = cell.losses.get(OURS), cell.losses.get(peer or "")
    if ours is None or theirs is None:
        return Check("loss", cell.name, "-", "lower", None)
    if ours.steps != theirs.steps:
        raise ValueError(f"{cell.name}: losses after {ours.steps} and {theirs.steps} steps cannot be compared; take both again")
    return Check("loss", cell.name, f"{loss(ours.mean)}, {loss(theirs.mean)}", "lower", ours.mean < theirs.mean)


def _median_and_worst(bar: str, shares: list[float | None], of: str) -> Check:
    asked = f"median within {MEDIAN_OFF:.0%}, worst within {WORST_OFF:.0%}"
    known = [share if bar == "bound" else abs(share) for share in shares if share is not None]
    if not known:
        return Check(bar, "", "-", asked, None)
    median, worst = statistics.median(known), max(known)
    met = median <= MEDIAN_OFF and worst <= WORST_OFF
    return Check(bar, "", f"median {median:.1%}, worst {worst:.1%} of {len(known)} {of}", asked, met)


def loss(value: float) -> str:
    """A loss for people."""
    return f"{value:.3f}" if math.isfinite(value) else "diverged"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
