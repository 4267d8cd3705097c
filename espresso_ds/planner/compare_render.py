"""A comparison for people: rich tables for the terminal, milliseconds as `predicted/measured`."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .compare import Comparison, Pair, UnitComparison


def table(found: Comparison, top: int) -> RenderableType:
    """The step as a whole, and the `top` units whose own work differs most from the prediction."""
    return Group(_whole(found), _units(found, top), _notes(found, top))


def _whole(found: Comparison) -> Table:
    shown = Table(
        box=box.SIMPLE_HEAD,
        title=f"Medians of {found.steps} steps on rank {found.rank} of {found.world_size}, in ms",
        title_justify="left",
    )
    shown.add_column("")
    for column in ("predicted", "measured", "ratio", "difference"):
        shown.add_column(column, justify="right")
    rows = (
        ("step", found.step),
        ("until backward ends", found.backward_end),
        ("waiting for synchronisation after it", found.exposed),
        ("codec work, all units", found.codec),
        ("links at work, all units", found.links),
    )
    for label, pair in rows:
        shown.add_row(label, _ms(pair.predicted_s), _ms(pair.measured_s), _ratio(pair), _signed(pair.difference_s))
    shown.add_row("copies of gradients, all units", "", _ms(found.copies_s), "", "")
    return shown


def _units(found: Comparison, top: int) -> Table:
    shown = Table(
        box=box.SIMPLE_HEAD,
        title="Units, the largest differences of their own work first: predicted/measured, in ms",
        title_justify="left",
    )
    shown.add_column("unit", justify="right")
    shown.add_column("tensor", overflow="fold")
    for column in ("ready", "codec", "links", "copies", "done", "ratio", "difference"):
        shown.add_column(column, justify="right")
    for unit in found.units[:top]:
        shown.add_row(
            str(unit.unit),
            _name(unit),
            _both(unit.ready),
            _both(unit.codec) if any(action.codec for action in unit.actions) else "",
            "\n".join(f"{routine.action} {_both(routine)}" for routine in unit.routines),
            _ms(unit.copies_s),
            _both(unit.done),
            _ratio(unit.work),
            _signed(unit.work.difference_s),
        )
    return shown


def _notes(found: Comparison, top: int) -> Text:
    notes = [
        "Times count from the synchronisation of the step before. A routine counts from its issue, or from the end of the one "
        "that the link served before it, until it is complete: what it waits for slower ranks is in it.",
    ]
    if found.device != "cpu":
        notes.append(f"The clock is the host's: on {found.device} codec work and copies are what it takes to launch them.")
    if top < len(found.units):
        notes.append(f"{top} of {len(found.units)} units are shown; `--top {len(found.units)}` shows all.")
    return Text("\n".join(notes), style="dim")


def _name(unit: UnitComparison) -> str:
    more = len(unit.tensors) - 1
    return unit.tensors[0] + (f" (+{more})" if more else "")


def _both(pair: Pair) -> str:
    return f"{_ms(pair.predicted_s)}/{_ms(pair.measured_s)}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}" if abs(seconds) < 0.01 else f"{seconds * 1e3:.1f}"


def _signed(seconds: float) -> str:
    return _ms(0.0) if abs(seconds) < 0.5e-6 else f"{'+' if seconds > 0 else ''}{_ms(seconds)}"


def _ratio(pair: Pair) -> str:
    return "" if pair.ratio is None else f"{pair.ratio:.2f}"
